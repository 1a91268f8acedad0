"""Encoded examples of the preferred and the rejected side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from steering_vectors.data.batches import Encoded

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sides:
    """Encoded preferred and rejected examples; with `paired`, entry i of both belongs to one row."""

    positives: tuple[Encoded, ...]
    negatives: tuple[Encoded, ...]
    paired: bool

    def thinned(self, most: int) -> Sides:
        """At most so many examples a side, evenly spread over them."""
        return Sides(spread(self.positives, most), spread(self.negatives, most), self.paired)


def spread(examples: Sequence[Item], most: int) -> tuple[Item, ...]:
    """At most so many of the examples, evenly spread over them."""
    count = len(examples)
    return tuple(examples) if count <= most else tuple(examples[i * count // most] for i in range(most))
