"""Where the lines of a conversation come from: a person at a terminal, or a pipe.

Owns the loop, what Ctrl-C and Ctrl-D mean in it, and the history of what was typed. At a terminal errors are shown and
the conversation goes on; it goes on from a pipe too, and the exit code tells of them at the end.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter
from prompt_toolkit.history import FileHistory

from server.chat.commands import COMMANDS, Ended, run
from server.chat.conversation import Sampling
from server.chat.remote import Remote
from server.chat.screen import Screen
from server.chat.session import Session, open_session
from steering_vectors.errors import TrimtabError

Reader = Callable[[], str]


class Remembered(FileHistory):
    """What was typed before, as far as its file can be read and written."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def chat(url: str, api_key: str, model: str, system: str, sampling: Sampling) -> bool:
    """Talk until the end; False if lines of a pipe failed. Raises RemoteError if it cannot begin."""
    remote, screen = Remote(url, api_key), Screen()
    try:
        session = open_session(remote, screen, model, system, sampling)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return converse(session, piped_lines())
        screen.note(f"[{session.conversation.model} at {remote.url}; /help lists the commands, Ctrl-D ends]")
        converse(session, typed_lines(session), patient=True)
        return True
    finally:
        remote.close()


def converse(session: Session, read: Reader, *, patient: bool = False) -> bool:
    """Answer line after line until there is none; whether all went well. Patient, it takes a Ctrl-C between replies."""
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
            _answer(session, line)
        except Ended:
            return well
        except TrimtabError as error:
            well = False
            session.screen.error(error.message)
        except KeyboardInterrupt:
            session.screen.note("[stopped]")


def _answer(session: Session, line: str) -> None:
    if line.startswith("/"):
        run(session, line)
    elif line.strip():
        session.ask(line.strip())


def piped_lines() -> Reader:
    """Lines of stdin."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


def typed_lines(session: Session) -> Reader:
    """Lines that a person types, with history and completion; the prompt says what steers."""
    names = {str(entry["name"]): None for entry in session.remote.get("/profiles")["profiles"]}
    words = {f"/{name}": {**names, "off": None} if name == "steer" else None for name in COMMANDS}
    prompt: PromptSession[str] = PromptSession(
        history=Remembered(str(history_file())), completer=NestedCompleter.from_nested_dict(words)
    )
    return lambda: prompt.prompt(f"{session.conversation.steering_text}> ")


def history_file() -> Path:
    """The file of what was typed, in the user's state directory, which is made if that can be done."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    directory = Path(state) / "trimtab"
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / "chat_history"
