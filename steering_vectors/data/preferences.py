"""Preference data in memory: examples of the wanted side, examples of the other, and how to hold some out.

Owns the uniform view that fitting and evaluation work on, whatever the file looked like. Knows nothing of files and
columns (`datasets`), nor of tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from steering_vectors.data.chat import Example
from steering_vectors.errors import DataError

Kind = Literal["preference", "unpaired", "contrast"]
MIN_SIDE = 4
MIN_ROWS = 16
MIN_PER_LABEL = 8


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a file of preference data says.

    `positives` and `negatives` are aligned for the paired kinds "preference" and "contrast": entry i of both comes
    from one row. `skipped` counts the bad rows left out, `skip_messages` holds the first few reasons;
    `ignored_columns` are the columns that no format uses. `sha256` names the source as a whole, for its parts too.
    """

    kind: Kind
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...]
    source: str = ""
    sha256: str = ""
    skipped: int = 0
    skip_messages: tuple[str, ...] = ()
    ignored_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.paired or len(self.positives) == len(self.negatives), "pairs must be aligned"

    @property
    def paired(self) -> bool:
        return self.kind != "unpaired"

    @property
    def rows(self) -> int:
        """How many usable rows there are."""
        return len(self.positives) if self.paired else len(self.positives) + len(self.negatives)

    @property
    def duplicates(self) -> int:
        """How many rows repeat an earlier one."""
        items = self._items()
        return len(items) - len(set(items))

    def check(self, *, left_out: str = "") -> None:
        """Raise DataError for fewer than 16 rows, fewer than 8 of a label, or if no row prefers anything.

        `left_out` says in words which rows are not among them.
        """
        left_out = left_out or (f"{self.skipped} bad ones were skipped" if self.skipped else "")
        without = f" ({left_out})" if left_out else ""
        path = self.source or None
        if self.rows < MIN_ROWS:
            raise DataError(f"it has {self.rows} usable rows{without}; at least {MIN_ROWS} are needed", path=path)
        for label, side in (("true", self.positives), ("false", self.negatives)):
            if len(side) < MIN_PER_LABEL:
                raise DataError(
                    f"it has {len(side)} usable rows with label {label}{without}; at least {MIN_PER_LABEL} are needed",
                    path=path,
                )
        if self.paired and self.positives == self.negatives:
            raise DataError("in every row both sides are the same text, so nothing is preferred", path=path)

    def sides(self) -> tuple[list[Example], list[Example]]:
        """The positive and the negative examples; aligned if `paired`."""
        return list(self.positives), list(self.negatives)

    def pairs(self) -> list[tuple[Example, Example]]:
        """(positive, negative) of each row. Raises DataError for unpaired data."""
        if not self.paired:
            raise DataError(f"{self.source}: its rows are not paired; use a method that takes unpaired data")
        return list(zip(self.positives, self.negatives, strict=True))

    def split(
        self, heldout_fraction: float = 0.2, seed: int = 0, *, min_side: int = MIN_SIDE
    ) -> tuple[Preferences, Preferences]:
        """Part the rows into (train, heldout), the same for the same seed, each in the order of the file.

        Rows that share a prompt stay together (rows without one: those that share a completion), so what is held out
        was never trained on. Each part gets at least `min_side` rows, of each label if unpaired. Raises DataError if
        the data cannot be parted so.
        """
        if not 0 < heldout_fraction < 1:
            raise DataError(f"the held-out fraction must lie between 0 and 1, not {heldout_fraction:g}")
        groups = [_Group(rows, self._sizes(rows)) for rows in self._groups()]
        held = {row for group in _choose(groups, heldout_fraction, min_side, seed) for row in group.rows}
        train, heldout = self._part(set(range(self.rows)) - held), self._part(held)
        if any(size < min_side for part in (train, heldout) for size in part._sizes(range(part.rows))):
            raise DataError(
                f"{self.source}: too few different prompts or texts to hold out {min_side} rows"
                f"{'' if self.paired else ' of each label'} and to train on as many; add rows with other prompts"
            )
        return train, heldout

    def _items(self) -> list[tuple[Example | None, Example | None]]:
        """One (positive, negative) per row; unpaired: the positives first, and None for the side a row lacks."""
        if self.paired:
            return list(zip(self.positives, self.negatives, strict=True))
        return [(one, None) for one in self.positives] + [(None, one) for one in self.negatives]

    def _sizes(self, rows: Sequence[int]) -> tuple[int, ...]:
        if self.paired:
            return (len(rows),)
        positive = sum(row < len(self.positives) for row in rows)
        return positive, len(rows) - positive

    def _part(self, rows: set[int]) -> Preferences:
        items = [item for row, item in enumerate(self._items()) if row in rows]
        positives = tuple(positive for positive, _ in items if positive is not None)
        negatives = tuple(negative for _, negative in items if negative is not None)
        return replace(self, positives=positives, negatives=negatives)

    def _groups(self) -> list[list[int]]:
        """The rows, grouped so that no prompt (or promptless text) occurs in two groups."""
        leader = list(range(self.rows))

        def find(row: int) -> int:
            while leader[row] != row:
                leader[row] = row = leader[leader[row]]
            return row

        first: dict[object, int] = {}
        for row, item in enumerate(self._items()):
            for example in item:
                if example is not None:
                    leader[find(row)] = find(first.setdefault(_key(example), row))
        groups = defaultdict(list)
        for row in range(self.rows):
            groups[find(row)].append(row)
        return list(groups.values())


@dataclass(frozen=True, slots=True)
class _Group:
    rows: list[int]
    sizes: tuple[int, ...]


def _key(example: Example) -> object:
    return (example.completion,) if example.prompt is None else example.prompt


def _choose(groups: list[_Group], fraction: float, min_side: int, seed: int) -> list[_Group]:
    """Groups to hold out: at random up to the wanted sizes, then the smallest that fill what is lacking."""
    totals = [sum(sizes) for sizes in zip(*(group.sizes for group in groups), strict=True)]
    wanted = [max(min_side, round(fraction * total)) for total in totals]
    random.Random(seed).shuffle(groups)
    chosen: list[_Group] = []
    rest: list[_Group] = []
    held = [0] * len(totals)
    for group in groups:
        after = _add(held, group.sizes)
        fits = all(have <= want for have, want in zip(after, wanted, strict=True))
        (chosen if fits else rest).append(group)
        held = after if fits else held
    for group in sorted(rest, key=lambda group: len(group.rows)):
        if any(have < min_side and size for have, size in zip(held, group.sizes, strict=True)):
            chosen.append(group)
            held = _add(held, group.sizes)
    return chosen


def _add(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]
