"""Simulated people whose taste, signals and mistakes are known: what they do with two answers to a prompt."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.feedback.items import Answer, Kind, PromptValue, Stored
from server.learning.behaviour.signals import WORDS_PER_SECOND

# How often somebody does something with an answer that pleases, and with one that does not. Log-odds: logit - logit.
DONE = {"copied": (0.5, 0.12), "regenerated": (0.06, 0.4), "continued": (0.4, 0.15), "abandoned": (0.08, 0.3)}
DWELL = (0.0, -0.6)  # means of log(dwell time / reading time) for both
DWELL_SPREAD = 0.6


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt and two answers, of which one is truly better."""

    prompt: PromptValue
    better: str
    worse: str

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return {"prompt": self.prompt, "text": self.better}, {"prompt": self.prompt, "text": self.worse}


@dataclass(slots=True)
class Crowd:
    """People and bots. `noise` is how often a person takes the worse answer for the better one."""

    seed: int
    noise: float = 0.0
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def votes(self, user: str, pairs: Iterable[Seen]) -> list[Stored]:
        """Explicit votes of a person."""
        return [self._vote(user, pair, right=self.draw.random() >= self.noise) for pair in pairs]

    def signals(self, user: str, pairs: Iterable[Seen], judged: float = 0.0) -> list[Stored]:
        """What a person does with both answers; and with a chance of `judged`, which one the person says is better."""
        found = []
        for pair in pairs:
            right = self.draw.random() >= self.noise
            for answer, pleases in zip(pair.answers, (right, not right), strict=True):
                for name, chances in DONE.items():
                    if self.draw.random() < chances[0 if pleases else 1]:
                        found.append(signal(user, answer, name))
                ratio = self.draw.lognormvariate(DWELL[0 if pleases else 1], DWELL_SPREAD)
                found.append(
                    signal(user, answer, "dwell_seconds", ratio * len(answer["text"].split()) / WORDS_PER_SECOND)
                )
            if self.draw.random() < judged:
                found.append(self._vote(user, pair, right=right))
        return found

    def spam(self, user: str, pairs: Iterable[Seen]) -> list[Stored]:
        """Signals at random, with dwell times that have nothing to do with the texts."""
        found = []
        for pair in pairs:
            for answer in pair.answers:
                found += [signal(user, answer, name) for name in DONE if self.draw.random() < 0.4]
                found.append(signal(user, answer, "dwell_seconds", 10 ** self.draw.uniform(-1, 2.5)))
        return found

    def one_sided(self, user: str, pairs: Iterable[Seen], side: str) -> list[Stored]:
        """Votes of a bot: always for the `first` answer as shown, or always for the `worse` one."""
        return [self._vote(user, pair, right=side == "first" and self.draw.random() < 0.5) for pair in pairs]

    def _vote(self, user: str, pair: Seen, *, right: bool) -> Stored:
        answers = pair.answers
        swapped = self.draw.random() < 0.5
        shown = answers[::-1] if swapped else answers
        return stored("pair", {"better": "a" if right != swapped else "b"}, user, shown)


def signal(user: str | None, answer: Answer, name: str, seconds: float | None = None) -> Stored:
    value: dict[str, Any] = {"signal": name} if seconds is None else {"signal": name, "seconds": seconds}
    return stored("signal", value, user, (answer,))


def stored(kind: Kind, value: dict[str, Any], user: str | None, answers: Sequence[Answer]) -> Stored:
    return Stored(0, "fb", 1.0, "", "", user, kind, value, None, "", tuple(answers), [user] * len(answers))


def shared_out(pairs: Sequence[Seen], users: int, name: str = "person") -> dict[str, list[Seen]]:
    """The pairs divided among users in turn."""
    return {f"{name}-{number}": list(pairs[number::users]) for number in range(users)}
