"""The slash commands: one function for each, and the table of their names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.chat.conversation import EXAMPLE, ChatError, read_steering
from server.chat.screen import describe_steering
from server.chat.session import Session

OFF = "off"


class Ended(Exception):
    """The user ended the conversation."""


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` follows the name in /help, `meaning` is one line."""

    run: Callable[[Session, str], None]
    usage: str
    meaning: str


def run(session: Session, line: str) -> None:
    """Run a line that begins with a slash. Raises ChatError for an unknown command, Ended for /quit."""
    name, _, text = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        advice = f"do you mean /{near[0]}?" if near else "/help lists them"
        raise ChatError(f"there is no command /{name}: {advice} (a question that begins with / needs a space first)")
    COMMANDS[name].run(session, text.strip())


def steer(session: Session, text: str) -> None:
    present = session.conversation.steering
    wanted = () if text == OFF else read_steering(text) if text else present
    session.screen.note(describe_steering(session.steer(wanted)))


def profiles(session: Session, _text: str) -> None:
    session.screen.profiles(session.remote.get("/profiles")["profiles"])


def compare(session: Session, text: str) -> None:
    question, before = (text, session.conversation.turns) if text else session.conversation.last_question()
    session.compare(question, before)


def retry(session: Session, _text: str) -> None:
    question, before = session.conversation.last_question()
    session.ask(question, before)


def system(session: Session, text: str) -> None:
    if text:
        session.conversation.system = "" if text == OFF else text
    session.screen.note(f"[system: {session.conversation.system or 'none'}]")


def clear(session: Session, _text: str) -> None:
    session.conversation.turns = []
    session.conversation.unanswered = ""
    session.screen.note("[a new conversation; system and steering stay]")


def history(session: Session, _text: str) -> None:
    for turn in session.conversation.turns:
        session.screen.line(f"> {turn.question}\n{turn.reply.text}")


def save(session: Session, text: str) -> None:
    if not text:
        raise ChatError("name a file: /save FILE")
    session.conversation.save(Path(text).expanduser())
    session.screen.note(f"[saved to {text}]")


def help_(session: Session, _text: str) -> None:
    session.screen.pairs((f"/{name} {one.usage}".rstrip(), one.meaning) for name, one in COMMANDS.items())


def end(_session: Session, _text: str) -> None:
    raise Ended


COMMANDS = {
    "steer": Command(steer, "NAME STRENGTH …", f"set the steering, as in /steer {EXAMPLE}; /steer off"),
    "profiles": Command(profiles, "", "list the served profiles"),
    "compare": Command(compare, "[QUESTION]", "answer the last question, or this one, without and with the steering"),
    "retry": Command(retry, "", "replace the last reply by a new one"),
    "system": Command(system, "TEXT", "set the system message; /system off"),
    "clear": Command(clear, "", "begin a new conversation"),
    "history": Command(history, "", "show the conversation"),
    "save": Command(save, "FILE", "save the conversation, with its receipts, as JSON"),
    "help": Command(help_, "", "show this list"),
    "quit": Command(end, "", "quit, as Ctrl-D does; Ctrl-C stops a reply"),
}
