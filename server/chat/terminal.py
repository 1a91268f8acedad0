"""The loop of a conversation, with lines from a terminal or a pipe, and its slash commands.

Errors are shown and the conversation goes on; with a pipe, the exit code says whether there were any.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter
from prompt_toolkit.history import FileHistory

from server.chat.conversation import EXAMPLE, ChatError, Conversation, Sampling, open_conversation, read_steering
from server.chat.remote import Remote
from server.chat.screen import Screen
from steering_vectors.errors import TrimtabError

Reader = Callable[[], str]
OFF = "off"


class Ended(Exception):
    """The user ended the conversation."""


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` follows the name in /help, `meaning` is one line."""

    run: Callable[[Conversation, str], None]
    usage: str
    meaning: str


class Remembered(FileHistory):
    """The history of input, if its file can be read and written."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def chat(url: str, api_key: str, model: str, system: str, sampling: Sampling) -> bool:
    """Run a conversation; False if lines of a pipe failed. Raises RemoteError if it cannot begin."""
    remote, screen = Remote(url, api_key), Screen()
    try:
        talk = open_conversation(remote, screen, model, system, sampling)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            for stream in (sys.stdin, sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(encoding="utf-8", errors="replace")
            return converse(talk, input)
        screen.note(f"[{talk.model} at {remote.url}; /help lists the commands, Ctrl-D ends]")
        converse(talk, typed_lines(talk), patient=True)
        return True
    finally:
        remote.close()


def converse(talk: Conversation, read: Reader, *, patient: bool = False) -> bool:
    """Answer all lines, and return whether none failed. If `patient`, a Ctrl-C between replies is ignored."""
    well = True
    while True:
        try:
            line = read()
        except EOFError:
            return well
        except KeyboardInterrupt:
            if not patient:
                raise
            continue
        try:
            _answer(talk, line)
        except Ended:
            return well
        except TrimtabError as error:
            well = False
            talk.screen.error(error.message)
        except KeyboardInterrupt:
            talk.screen.note("[stopped]")


def _answer(talk: Conversation, line: str) -> None:
    """Ask a question, or run a line that begins with a slash. Raises ChatError for an unknown command."""
    if not line.startswith("/"):
        if line.strip():
            talk.ask(line.strip())
        return
    name, _, text = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"do you mean /{near[0]}?" if near else "/help lists them"
        raise ChatError(f"there is no command /{name}: {advice} (a question that begins with / needs a space first)")
    COMMANDS[name].run(talk, text.strip())


def typed_lines(talk: Conversation) -> Reader:
    """Typed lines, with completion, and a history in the user's state directory; the prompt shows the steering."""
    names = {str(entry["name"]): None for entry in talk.remote.fetch("/profiles")["profiles"]}
    words = {f"/{name}": {**names, OFF: None} if name == "steer" else None for name in COMMANDS}
    directory = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "trimtab"
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    prompt: PromptSession[str] = PromptSession(
        history=Remembered(str(directory / "chat_history")), completer=NestedCompleter.from_nested_dict(words)
    )
    return lambda: prompt.prompt(f"{talk.steering}> ")


def steer(talk: Conversation, text: str) -> None:
    wanted = "" if text == OFF else read_steering(text) if text else talk.steering
    talk.screen.effect(talk.steer(wanted))


def profiles(talk: Conversation, _text: str) -> None:
    talk.screen.profiles(talk.remote.fetch("/profiles")["profiles"])


def compare(talk: Conversation, text: str) -> None:
    question, before = (text, talk.turns) if text else talk.last_question()
    talk.compare(question, before)


def system(talk: Conversation, text: str) -> None:
    if text:
        talk.system = "" if text == OFF else text
    talk.screen.note(f"[system: {talk.system or 'none'}]")


def clear(talk: Conversation, _text: str) -> None:
    talk.turns, talk.unanswered = [], ""
    talk.screen.note("[a new conversation; system and steering stay]")


def history(talk: Conversation, _text: str) -> None:
    for turn in talk.turns:
        talk.screen.line(f"> {turn.question}\n{turn.reply.text}")


def save(talk: Conversation, text: str) -> None:
    if not text:
        raise ChatError("name a file: /save FILE")
    talk.save(Path(text).expanduser())
    talk.screen.note(f"[saved to {text}]")


def help_(talk: Conversation, _text: str) -> None:
    talk.screen.pairs((f"/{name} {one.usage}".rstrip(), one.meaning) for name, one in COMMANDS.items())


def end(_talk: Conversation, _text: str) -> None:
    raise Ended


COMMANDS = {
    "steer": Command(steer, "NAME STRENGTH …", f"set the steering, as in /steer {EXAMPLE}; /steer off"),
    "profiles": Command(profiles, "", "list the served profiles"),
    "compare": Command(compare, "[QUESTION]", "answer the last question, or this one, without and with the steering"),
    "retry": Command(lambda talk, _text: talk.ask(*talk.last_question()), "", "replace the last reply by a new one"),
    "system": Command(system, "TEXT", "set the system message; /system off"),
    "clear": Command(clear, "", "begin a new conversation"),
    "history": Command(history, "", "show the conversation"),
    "save": Command(save, "FILE", "save the conversation, with its receipts, as JSON"),
    "help": Command(help_, "", "show this list"),
    "quit": Command(end, "", "quit, as Ctrl-D does; Ctrl-C stops a reply"),
}
