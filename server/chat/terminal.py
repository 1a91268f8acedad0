"""The loop of a conversation, with lines from a terminal or a pipe.

Errors are shown and the conversation goes on; with a pipe, the exit code says whether there were any.
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
        session = open_session(remote, screen, model, system, sampling)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return converse(session, piped_lines())
        screen.note(f"[{session.conversation.model} at {remote.url}; /help lists the commands, Ctrl-D ends]")
        converse(session, typed_lines(session), patient=True)
        return True
    finally:
        remote.close()


def converse(session: Session, read: Reader, *, patient: bool = False) -> bool:
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
    """Typed lines, with history and completion; the prompt shows the steering."""
    names = {str(entry["name"]): None for entry in session.remote.get("/profiles")["profiles"]}
    words = {f"/{name}": {**names, "off": None} if name == "steer" else None for name in COMMANDS}
    prompt: PromptSession[str] = PromptSession(
        history=Remembered(str(history_file())), completer=NestedCompleter.from_nested_dict(words)
    )
    return lambda: prompt.prompt(f"{session.conversation.steering_text}> ")


def history_file() -> Path:
    """The history's file in the user's state directory, which is created if possible."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    directory = Path(state) / "trimtab"
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / "chat_history"
