"""The encoded preferred and rejected examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from steering_vectors.data.batches import Encoded

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sides:
    """Encoded preferred and rejected examples. If `paired`, entry i of both comes from one row."""

    positives: tuple[Encoded, ...]
    negatives: tuple[Encoded, ...]
    paired: bool

    def thinned(self, size: int) -> Sides:
        """At most `size` evenly spaced examples of each side."""
        return Sides(spread(self.positives, size), spread(self.negatives, size), self.paired)


def spread(examples: Sequence[Item], size: int) -> tuple[Item, ...]:
    """At most `size` evenly spaced examples."""
    count = len(examples)
    return tuple(examples) if count <= size else tuple(examples[i * count // size] for i in range(size))
