"""Behaviours: what one user did with one answer, as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from server.feedback.items import Answer, Stored
from server.learning.held_out import prompt_key
from steering_vectors.data.chat import Message

SIGNALS = ("copied", "regenerated", "continued", "abandoned", "dwell")
WORDS_PER_SECOND = 4.0  # of silent reading: 238 words a minute (Brysbaert, Journal of Memory and Language 109, 2019)
MAX_DWELL = 2.0
Values = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a user did with an answer. `values` are in the order of SIGNALS: 1 for what was done, else 0, and for the
    dwell time the logarithm of its ratio to the reading time, within ±2. `key` stands for the prompt."""

    user: str | None
    key: str
    answer: Answer
    values: Values

    @property
    def place(self) -> tuple[str, str]:
        return self.key, self.answer["text"]


def behaviours_of(stored: Iterable[Stored]) -> list[Behaviour]:
    """The behaviours of feedback. What a user does twice with one text counts once, and of dwell times the last one
    counts. The user is who sent the signal, or else who asked for the answer. Prompts of token ids have none."""
    found: dict[tuple[str | None, str, str], tuple[Answer, dict[str, float]]] = {}
    for one in stored:
        key = key_of(one.answers[0]) if one.kind == "signal" else None
        if key is None:
            continue
        answer = one.answers[0]
        user = one.user or one.users[0]
        values = found.setdefault((user, key, answer["text"]), (answer, {}))[1]
        name = one.value["signal"]
        if name == "dwell_seconds":
            values["dwell"] = dwell(one.value["seconds"], answer["text"])
        else:
            values[name] = 1.0
    return [
        Behaviour(user, key, answer, tuple(values.get(name, 0.0) for name in SIGNALS))
        for (user, key, _), (answer, values) in found.items()
    ]


def dwell(seconds: float, text: str) -> float:
    """The logarithm of a dwell time over the reading time of a text, within ±2."""
    reading = max(1, len(text.split())) / WORDS_PER_SECOND
    return max(-MAX_DWELL, min(MAX_DWELL, math.log(max(seconds, 1e-3) / reading)))


def key_of(answer: Answer) -> str | None:
    """The key of an answer's prompt, as in `prompt_key`; None if it is token ids."""
    prompt = answer["prompt"]
    if isinstance(prompt, str):
        return prompt_key(prompt)
    messages = [Message(turn["role"], turn["content"]) for turn in prompt if not isinstance(turn, int)]  # type: ignore[arg-type]
    return prompt_key(tuple(messages)) if len(messages) == len(prompt) else None
