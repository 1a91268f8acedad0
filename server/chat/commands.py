"""What may be typed instead of a question: one function for each command, and the table that names them.

Knows the session they work on, and nothing of where lines come from.
"""

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
    """The conversation is over."""


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` is what follows the name, `meaning` one line for /help."""

    run: Callable[[Session, str], None]
    usage: str
    meaning: str


def run(session: Session, line: str) -> None:
    """Carry out a line that begins with a slash. Raises ChatError if there is no such command, Ended for /quit."""
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
    "steer": Command(steer, "NAME STRENGTH …", f"steer all replies to come, as in /steer {EXAMPLE}; /steer off"),
    "profiles": Command(profiles, "", "what can be steered by"),
    "compare": Command(compare, "[QUESTION]", "the last question, or this one, without steering and with the present"),
    "retry": Command(retry, "", "ask the last question again, in the place of its reply"),
    "system": Command(system, "TEXT", "the system message; /system off"),
    "clear": Command(clear, "", "forget what was said"),
    "history": Command(history, "", "show what was said"),
    "save": Command(save, "FILE", "write the conversation, with its receipts, as JSON"),
    "help": Command(help_, "", "this list"),
    "quit": Command(end, "", "the end; so does Ctrl-D, and Ctrl-C stops a reply"),
}
