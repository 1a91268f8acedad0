"""A conversation with a server.

A reply that fails leaves the conversation as it was, and its question for another try. One that is stopped is kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from server.chat.conversation import ChatError, Conversation, Reply, Sampling, Term, Turn, read_steering, write_steering
from server.chat.remote import Remote, RemoteError
from server.chat.screen import Screen, describe, unbroken

RESOLVE = "/steering/resolve"
UNSAID = "the server does not say that it steered: is it a trimtab server?"


@dataclass(slots=True)
class Session:
    """The state that commands work on."""

    conversation: Conversation
    remote: Remote
    screen: Screen

    def ask(self, question: str, before: Sequence[Turn] | None = None) -> None:
        """Stream a reply to a question after some turns, by default all of them. Raises RemoteError."""
        talk = self.conversation
        before = talk.turns if before is None else before
        if before is talk.turns:  # else the old reply stays until there is a new one
            talk.unanswered = question
        reply = self._streamed(talk.body(question, before))
        if reply.text or reply.finish_reason != "stopped":
            talk.answered(question, reply, before)
        self.screen.note(describe(reply))
        if talk.steering and not reply.steering and reply.finish_reason != "stopped":
            raise RemoteError(UNSAID)

    def compare(self, question: str, before: Sequence[Turn]) -> None:
        """Show the replies without and with the steering, with the same seed. Raises ChatError, RemoteError."""
        talk = self.conversation
        if not talk.steering:
            raise ChatError("nothing steers yet: set a steering to compare with by /steer NAME STRENGTH")
        seed = secrets.randbelow(2**31) if talk.sampling.seed is None else talk.sampling.seed
        bodies = [talk.body(question, before, steered=steered, seed=seed) for steered in (False, True)]
        replies = [_whole(self.remote.reply(body)) for body in bodies]
        self.screen.compared(["no steering", talk.steering_text], replies)

    def steer(self, terms: Sequence[Term]) -> Sequence[Mapping[str, Any]]:
        """Set the steering of all later replies, and return what it does by profile.

        Raises RemoteError, and changes nothing, if the server does not accept it.
        """
        body = {"steering": write_steering(terms)}
        resolved = self.remote.post(RESOLVE, body)["steering"] if terms else []
        self.conversation.steering = tuple(terms)
        return tuple(resolved)

    def _streamed(self, body: dict[str, Any]) -> Reply:
        """The reply, shown as it comes. Ctrl-C ends it and its connection."""
        text = ""
        end: dict[str, Any] = {}
        try:
            with closing(self.remote.stream(body)) as chunks:
                for chunk in chunks:
                    with unbroken():
                        text += _piece(chunk)
                        self.screen.piece(_piece(chunk))
                    end |= {name: chunk[name] for name in ("usage", "steering") if chunk.get(name) is not None}
                    end |= _finish(chunk)
        except KeyboardInterrupt:
            end = {}
        finally:
            self.screen.line()
        return _reply(text, end)


def open_session(remote: Remote, screen: Screen, model: str, system: str, sampling: Sampling) -> Session:
    """A session with the model of that name, by default the server's; an alias is a model with a steering.

    Raises RemoteError if the server cannot be reached, and for a model or profile that it does not serve.
    """
    base = str(remote.get("/v1/models")["data"][0]["id"])
    alias = model.removeprefix(f"{base}:") if model.startswith(f"{base}:") else ""
    if not alias and model not in ("", base):
        remote.get(f"/v1/models/{quote(model, safe='')}")
    session = Session(Conversation(base if alias else model or base, sampling, system), remote, screen)
    session.steer(read_steering(alias))
    return session


def _piece(chunk: Mapping[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _finish(chunk: Mapping[str, Any]) -> dict[str, str]:
    found = [choice["finish_reason"] for choice in chunk["choices"] if choice.get("finish_reason")]
    return {"finish_reason": found[0]} if found else {}


def _reply(text: str, end: Mapping[str, Any]) -> Reply:
    if "finish_reason" not in end:
        return Reply(text)
    tokens = end.get("usage", {}).get("completion_tokens")
    return Reply(text, end["finish_reason"], tokens, tuple(end.get("steering", ())))


def _whole(answer: Mapping[str, Any]) -> Reply:
    choice = answer["choices"][0]
    return _reply(choice["message"]["content"] or "", {**answer, "finish_reason": choice["finish_reason"]})
