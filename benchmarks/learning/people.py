"""Scripted people at the HTTP API: they ask, compare answers by a taste of their own, and say what they think."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.common.serving import Server
from benchmarks.quality.manners import MANNERS, is_broken, score

Prompt = list[dict[str, str]]
Answer = dict[str, Any]
TOKENS = 120
TRIES = 4  # after which a person who cannot tell answers apart leaves a question


@dataclass(frozen=True, slots=True)
class Taste:
    """A score of texts, higher for better: a manner of the demo's classifier, or few `words`."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in (*MANNERS, "words"):
            raise SystemExit(f"the taste {self.name!r} is not one of {', '.join((*MANNERS, 'words'))}")

    def __call__(self, text: str) -> float:
        if is_broken(text):
            return -100.0
        return -float(len(text.split())) if self.name == "words" else float(score(self.name, text))


@dataclass(slots=True)
class Person:
    """Somebody who votes by a taste."""

    server: Server
    profile: str
    taste: Taste
    seed: int
    answers: int = 6  # to each question, of which the best and the worst make a vote
    user: str = "person"
    scores: list[float] = field(default_factory=list)  # of all answers that the person has seen

    def vote(self, prompts: Sequence[Prompt], votes: int) -> int:
        """Ask for a few answers to each prompt and say which is the best and which the worst, until so many votes are
        given. Returns their number."""
        given, left = 0, list(prompts)
        for attempt in range(TRIES):
            left, asked = [], left[: votes - given] if attempt == 0 else left
            for prompt, answers in self._asked(asked, attempt):
                texts = [answer for answer in answers if answer["text"].strip()]
                scores = [self.taste(answer["text"]) for answer in texts]
                self.scores += scores
                if not scores or min(scores) == max(scores):
                    left.append(prompt)
                    continue
                best, worst = (texts[scores.index(pick(scores))] for pick in (max, min))
                self._say({"kind": "pair", "a": _named(best), "b": _named(worst), "better": "a"})
                given += 1
        return given

    def _asked(self, prompts: Sequence[Prompt], attempt: int) -> Iterator[tuple[Prompt, list[Answer]]]:
        seed = 10_000 * (self.seed + 1) + 1_000 * attempt
        answers = answered(self.server, self.profile, prompts, self.answers, seed=seed)
        yield from zip(prompts, answers, strict=True)

    def _say(self, body: dict[str, Any]) -> None:
        say(self.server, {**body, "user": self.user})


@dataclass(frozen=True, slots=True)
class Visitors:
    """Many people, each of whom asks once for the plain name and gives a thumb: up for an answer that their common
    taste scores above `threshold`."""

    server: Server
    profile: str
    taste: Taste
    threshold: float

    def visit(self, prompts: Sequence[Prompt], first: int) -> None:
        """One visitor asks each prompt; they are numbered from `first` on."""
        bodies = [
            {**asking(prompt, self.profile, seed=first + place), "user": f"visitor-{first + place}"}
            for place, prompt in enumerate(prompts)
        ]
        for body, answer in zip(bodies, self.server.generate_all(bodies), strict=True):
            if answer["text"].strip():
                thumb = "up" if self.taste(answer["text"]) > self.threshold else "down"
                say(self.server, {"kind": "thumb", "answer": _named(answer), "thumb": thumb, "user": body["user"]})


def answered(
    server: Server, profile: str, prompts: Sequence[Prompt], count: int, *, seed: int = 0
) -> list[list[Answer]]:
    """So many answers to each prompt."""
    bodies = [
        asking(prompt, profile, seed=seed + count * place + number)
        for place, prompt in enumerate(prompts)
        for number in range(count)
    ]
    found = server.generate_all(bodies)
    answers = [{**answer, "prompt": body["messages"]} for body, answer in zip(bodies, found, strict=True)]
    return [answers[place : place + count] for place in range(0, len(answers), count)]


def vote_at_random(server: Server, pairs: Sequence[Sequence[Answer]], seed: int) -> None:
    """Vote on pairs of answers, as texts, by a coin."""
    draw = random.Random(seed)
    for first, second in pairs:
        if first["text"].strip() and second["text"].strip() and first["text"] != second["text"]:
            texts = {"a": {"text": first["text"]}, "b": {"text": second["text"]}}
            vote = {"kind": "pair", "prompt": first["prompt"], **texts, "better": draw.choice("ab")}
            say(server, {**vote, "user": f"random-{seed}"})


def asking(prompt: Prompt, profile: str, *, seed: int) -> dict[str, Any]:
    return {"messages": prompt, "profile": profile, "strength": 1, "seed": seed, "max_tokens": TOKENS}


def say(server: Server, body: dict[str, Any]) -> None:
    """Give feedback; it is stored once this returns."""
    response = httpx.post(f"{server.url}/feedback", json=body, timeout=60)
    if response.status_code != 201:
        raise RuntimeError(f"{response.status_code}: {response.text}")


def scores_of(server: Server, profile: str, prompts: Sequence[Prompt], judge: Callable[[str], float]) -> np.ndarray:
    """The scores of one answer to each prompt: float64 `[prompts]`. Equal prompts get equal seeds."""
    answers = server.generate_all([asking(prompt, profile, seed=place) for place, prompt in enumerate(prompts)])
    return np.array([judge(answer["text"]) for answer in answers])


def _named(answer: Answer) -> dict[str, str]:
    return {"generation": answer["id"]}
