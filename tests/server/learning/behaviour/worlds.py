"""A world of two-sided texts, and the direction that votes on them give."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from benchmarks.learning.crowd import Seen
from server.learning.votes import Vote

WORDS, KIND = 200, 20
TRUTH = np.array([1.0] * KIND + [-1.0] * KIND + [0.0] * (WORDS - 2 * KIND))


def world(seed: int, count: int) -> list[Seen]:
    """Pairs of texts on prompts of their own. One word in eight is of the better, or of the worse kind."""
    draw = random.Random(seed)

    def text(kind: int) -> str:
        numbers = [
            kind * KIND + draw.randrange(KIND) if draw.random() < 0.125 else draw.randrange(WORDS)
            for _ in range(draw.randint(15, 60))
        ]
        return " ".join(f"w{number}" for number in numbers)

    return [Seen(f"prompt {seed} {number}", text(0), text(1)) for number in range(count)]


def direction(votes: Sequence[Vote]) -> np.ndarray:
    """The weighed mean difference of the shares of words: what mean-diff is to activations."""
    weights = sum(vote.weight for vote in votes)
    return (
        np.sum(
            [vote.weight * (_shares(vote.chosen.completion) - _shares(vote.rejected.completion)) for vote in votes], 0
        )
        / weights
    )


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _shares(text: str) -> np.ndarray:
    words = text.split()
    return np.bincount([int(word[1:]) for word in words], minlength=WORDS) / len(words)
