"""A conversation with a server: its turns, its steering, and its requests.

A reply that fails leaves the conversation as it was, and its question for another try. One that is stopped is kept.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from server.chat.remote import CHAT, Json, Remote, RemoteError
from server.chat.screen import Screen, unbroken
from steering_vectors.errors import TrimtabError

EXAMPLE = "warm 0.8 concise -0.3"


class ChatError(TrimtabError):
    """A command cannot be carried out."""

    code = "chat"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; None is the server's default."""

    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply. If the user stopped it, `tokens` is None and `finish_reason` "stopped"."""

    text: str
    finish_reason: str = "stopped"
    tokens: int | None = None
    steering: Sequence[Mapping[str, Any]] = ()

    @property
    def receipt(self) -> str:
        """The steering, its number of positions, and the number of tokens, in one line."""
        if self.finish_reason == "stopped":
            return "[stopped]"
        terms = [
            f"{entry['name']}@{entry['strength']:g} at {entry['steered_tokens']} positions" for entry in self.steering
        ]
        end = ", cut at the limit" if self.finish_reason == "length" else ""
        return f"[{', '.join(terms) or 'no steering'}; {self.tokens} tokens{end}]"


@dataclass(frozen=True, slots=True)
class Turn:
    question: str
    reply: Reply


@dataclass(slots=True)
class Conversation:
    """What commands work on: the answered turns, and how to go on. A question whose reply failed is `unanswered` until
    the next reply."""

    remote: Remote
    screen: Screen
    model: str
    sampling: Sampling = Sampling()
    system: str = ""
    steering: str = ""  # in the server's grammar, `warm@0.8+concise@-0.3`
    turns: list[Turn] = field(default_factory=list)
    unanswered: str = ""

    def ask(self, question: str, before: Sequence[Turn] | None = None) -> None:
        """Stream a reply to a question after some turns, by default all of them. Raises RemoteError."""
        before = self.turns if before is None else before
        if before is self.turns:  # else the old reply stays until there is a new one
            self.unanswered = question
        reply = self._streamed(self._body(question, before, self.sampling.seed))
        if reply.text or reply.finish_reason != "stopped":
            self.turns = [*before, Turn(question, reply)]
            self.unanswered = ""
        self.screen.note(reply.receipt)
        if self.steering and not reply.steering and reply.finish_reason != "stopped":
            raise RemoteError("the server does not say that it steered: is it a trimtab server?")

    def compare(self, question: str, before: Sequence[Turn]) -> None:
        """Show the replies without and with the steering, with the same seed. Raises ChatError, RemoteError."""
        if not self.steering:
            raise ChatError("nothing steers yet: set a steering to compare with by /steer NAME STRENGTH")
        seed = secrets.randbelow(2**31) if self.sampling.seed is None else self.sampling.seed
        replies = []
        for steered in (False, True):
            answer = self.remote.fetch(CHAT, self._body(question, before, seed, steered=steered))
            choice = answer["choices"][0]
            end = {**answer, "finish_reason": choice["finish_reason"]}
            replies.append(_reply(choice["message"]["content"] or "", end))
        texts, receipts = [reply.text.strip() for reply in replies], [reply.receipt for reply in replies]
        self.screen.compared(["no steering", self.steering], texts, receipts)

    def steer(self, steering: str) -> Sequence[Mapping[str, Any]]:
        """Set the steering of all later replies, and return what it does by profile. Raises RemoteError, and changes
        nothing, if the server does not accept it."""
        resolved = self.remote.fetch("/steering/resolve", {"steering": steering})["steering"] if steering else ()
        self.steering = steering
        return tuple(resolved)

    def last_question(self) -> tuple[str, list[Turn]]:
        """The last question, answered or not, and the turns before it. Raises ChatError if there is none."""
        if self.unanswered:
            return self.unanswered, self.turns
        if not self.turns:
            raise ChatError("nothing has been asked yet")
        return self.turns[-1].question, self.turns[:-1]

    def save(self, path: Path) -> None:
        """Write everything as JSON to a new file. Raises ChatError if it exists or cannot be written."""
        whole: Json = {"model": self.model, "system": self.system, "steering": self.steering}
        whole |= {"sampling": asdict(self.sampling), "turns": [asdict(turn) for turn in self.turns]}
        text = json.dumps(whole, indent=2, ensure_ascii=False)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except FileExistsError as error:
            raise ChatError(f"{path} exists: name another file") from error
        except OSError as error:
            raise ChatError(f"{path} cannot be written ({error.strerror})") from error

    def _body(self, question: str, before: Sequence[Turn], seed: int | None, *, steered: bool = True) -> Json:
        """The body of POST /v1/chat/completions for a question after some turns."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in before:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
        body: Json = {"model": self.model, "messages": [*messages, {"role": "user", "content": question}]}
        drawn = {**asdict(self.sampling), "seed": seed}
        body |= {name: value for name, value in drawn.items() if value is not None}
        return {**body, "steering": self.steering} if steered and self.steering else body

    def _streamed(self, body: Json) -> Reply:
        """The reply, shown as it comes. Ctrl-C ends it and its connection."""
        text = ""
        end: Json = {}
        try:
            with closing(self.remote.stream(body)) as chunks:
                for chunk in chunks:
                    end |= {name: chunk[name] for name in ("usage", "steering") if chunk.get(name) is not None}
                    for choice in chunk["choices"]:
                        piece = choice["delta"].get("content") or ""
                        with unbroken():
                            text += piece
                            self.screen.piece(piece)
                        if choice.get("finish_reason"):
                            end["finish_reason"] = choice["finish_reason"]
        except KeyboardInterrupt:
            end = {}
        finally:
            self.screen.line()
        return _reply(text, end)


def open_conversation(remote: Remote, screen: Screen, model: str, system: str, sampling: Sampling) -> Conversation:
    """A conversation with the model of that name, by default the server's; an alias is a model with a steering.

    Raises RemoteError if the server cannot be reached, and for a model or profile that it does not serve.
    """
    base = str(remote.fetch("/v1/models")["data"][0]["id"])
    alias = model.removeprefix(f"{base}:") if model.startswith(f"{base}:") else ""
    if not alias and model not in ("", base):
        remote.fetch(f"/v1/models/{quote(model, safe='')}")
    conversation = Conversation(remote, screen, base if alias else model or base, sampling, system)
    conversation.steer(read_steering(alias))
    return conversation


def read_steering(text: str) -> str:
    """Read `warm 0.8 concise -0.3`, or the server's grammar, into the latter; a name without a number is at strength 1.

    Raises ChatError for a number in place of a name, and for one that is not finite.
    """
    words = [word for word in re.split(r"[\s@+]+", text) if word]
    terms = []
    while words:
        name = words.pop(0)
        if _number(name) is not None:
            raise ChatError(f"{name!r} is not a profile: write for example /steer {EXAMPLE}")
        strength = _number(words[0]) if words else None
        if strength is None:
            strength = 1.0
        else:
            words.pop(0)
        if not math.isfinite(strength):
            raise ChatError(f"the strength of {name!r} must be a finite number")
        terms.append(f"{name}@{strength:g}")
    return "+".join(terms)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _reply(text: str, end: Mapping[str, Any]) -> Reply:
    if "finish_reason" not in end:
        return Reply(text)
    tokens = end.get("usage", {}).get("completion_tokens")
    return Reply(text, end["finish_reason"], tokens, tuple(end.get("steering", ())))
