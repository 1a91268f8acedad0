"""The state of one conversation: its turns, its steering, and the body of the next request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steering_vectors.errors import TrimtabError

Json = dict[str, Any]
EXAMPLE = "warm 0.8 concise -0.3"


class ChatError(TrimtabError):
    """A command cannot be carried out."""

    code = "chat"


@dataclass(frozen=True, slots=True)
class Term:
    """A profile at a strength."""

    name: str
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}@{self.strength:g}"


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


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its reply."""

    question: str
    reply: Reply


@dataclass(slots=True)
class Conversation:
    """The answered turns. A question whose reply failed is `unanswered` until the next reply."""

    model: str
    sampling: Sampling = Sampling()
    system: str = ""
    steering: tuple[Term, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    unanswered: str = ""

    @property
    def steering_text(self) -> str:
        return write_steering(self.steering)

    def last_question(self) -> tuple[str, list[Turn]]:
        """The last question, answered or not, and the turns before it. Raises ChatError if there is none."""
        if self.unanswered:
            return self.unanswered, self.turns
        if not self.turns:
            raise ChatError("nothing has been asked yet")
        return self.turns[-1].question, self.turns[:-1]

    def body(self, question: str, before: Sequence[Turn], *, steered: bool = True, seed: int | None = None) -> Json:
        """The body of POST /v1/chat/completions for a question after some turns."""
        drawn = {**asdict(self.sampling), "seed": self.sampling.seed if seed is None else seed}
        body: Json = {"model": self.model, "messages": self._messages(question, before)}
        body |= {name: value for name, value in drawn.items() if value is not None}
        return {**body, "steering": self.steering_text} if steered and self.steering else body

    def answered(self, question: str, reply: Reply, before: Sequence[Turn]) -> None:
        """Add a reply after the turns before it."""
        self.turns = [*before, Turn(question, reply)]
        self.unanswered = ""

    def save(self, path: Path) -> None:
        """Write everything as JSON to a new file. Raises ChatError if it exists or cannot be written."""
        whole: Json = {"model": self.model, "system": self.system, "steering": self.steering_text}
        whole |= {"sampling": asdict(self.sampling), "turns": [asdict(turn) for turn in self.turns]}
        text = json.dumps(whole, indent=2, ensure_ascii=False)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except FileExistsError as error:
            raise ChatError(f"{path} exists: name another file") from error
        except OSError as error:
            raise ChatError(f"{path} cannot be written ({error.strerror})") from error

    def _messages(self, question: str, before: Sequence[Turn]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in before:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
        return [*messages, {"role": "user", "content": question}]


def read_steering(text: str) -> tuple[Term, ...]:
    """Read `warm 0.8 concise -0.3`, or `warm@0.8+concise@-0.3`; a name without a number is at strength 1.

    Raises ChatError for a number in place of a name, and for one that is not finite.
    """
    words = [word for word in re.split(r"[\s@+]+", text) if word]
    terms: list[Term] = []
    while words:
        name = words.pop(0)
        if _number(name) is not None:
            raise ChatError(f"{name!r} is not a profile: write for example /steer {EXAMPLE}")
        strength = _number(words[0]) if words else None
        if strength is not None:
            words.pop(0)
        if strength is not None and not math.isfinite(strength):
            raise ChatError(f"the strength of {name!r} must be a finite number")
        terms.append(Term(name, 1.0 if strength is None else strength))
    return tuple(terms)


def write_steering(terms: Sequence[Term]) -> str:
    """A steering in the server's grammar, `warm@0.8+concise@-0.3`; empty for none."""
    return "+".join(map(str, terms))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
