"""Preference data in memory: preferred and rejected examples, and the held-out split."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from steering_vectors.data.chat import Example
from steering_vectors.errors import DataError

Kind = Literal["preference", "unpaired", "contrast"]
Side = Literal["prompt", "positive", "negative"]
MIN_SIDE = 4
MIN_ROWS = 16
MIN_PER_LABEL = 8
MAX_SKIP_MESSAGES = 5


@dataclass(frozen=True, slots=True)
class Preferences:
    """The examples of a source of preference data.

    For the paired kinds "preference" and "contrast", entry i of `positives` and of `negatives` comes from one row.
    `skipped` counts the bad rows that were left out, and `skip_messages` holds the first few reasons. `ignored_columns`
    are the columns that the format does not use. `sha256` is that of the whole source, also after a split.

    `notes` says what looks mistaken in the rows. For errors, `lines` holds the line of each row in the order of
    `items`, and `fields` the columns of the prompt, of the preferred and of the other text. `skip_bad_rows` leaves out
    rows that a model's chat template or tokenizer refuses.

    `weights` says how much each row counts in a fit, in the order of `items`; without them all rows count alike. Raises
    DataError unless there is one positive number for each row.
    """

    kind: Kind
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...]
    source: str = ""
    sha256: str = ""
    skipped: int = 0
    skip_messages: tuple[str, ...] = ()
    ignored_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()
    fields: tuple[str, str, str] = ("", "", "")
    skip_bad_rows: bool = False
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert not self.paired or len(self.positives) == len(self.negatives), "pairs must be aligned"
        if self.weights and len(self.weights) != self.rows:
            message = f"there are {len(self.weights)} weights for {self.rows} rows: give each row one"
            raise DataError(message, path=self.source or None)
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise DataError("the weights of rows must be positive numbers", path=self.source or None)
        if len(self.lines) != self.rows:  # rows were replaced
            object.__setattr__(self, "lines", ())

    @property
    def paired(self) -> bool:
        return self.kind != "unpaired"

    @property
    def rows(self) -> int:
        return len(self.positives) if self.paired else len(self.positives) + len(self.negatives)

    @property
    def weighted(self) -> bool:
        """Whether some rows count more than others."""
        return len(set(self.weights)) > 1

    @property
    def effective_rows(self) -> float:
        """The number of rows of equal weight whose mean varies as much: (Σw)² ÷ Σw² (Kish, Survey Sampling, 1965)."""
        if not self.weights:
            return float(self.rows)
        return sum(self.weights) ** 2 / sum(weight**2 for weight in self.weights)

    def side_weights(self) -> tuple[list[float], list[float]] | None:
        """The weight of each positive and of each negative example; None if all count alike."""
        if not self.weighted:
            return None
        weights = list(self.weights)
        return (weights, weights) if self.paired else (weights[: len(self.positives)], weights[len(self.positives) :])

    @property
    def duplicates(self) -> int:
        """The number of rows that repeat an earlier one."""
        return self.rows - len(set(self.items()))

    @property
    def first_skipped(self) -> str:
        """Why the first bad row was skipped, without the path of the file; an empty text if none was."""
        return self.without_path(self.skip_messages[0]) if self.skip_messages else ""

    def without_path(self, message: str) -> str:
        """The message of an error in a row, without the path of the file."""
        return message.removeprefix(f"{self.source}, ")

    def check(self, *, left_out: str = "") -> None:
        """Raise DataError for fewer than 16 rows, fewer than 8 of a label, or if both sides of every row are equal.

        `left_out` describes rows that were left out, for the message.
        """
        left_out = left_out or (f"{self.skipped} bad ones were skipped" if self.skipped else "")
        without = f" ({left_out})" if left_out else ""
        first = f"; the first bad row: {self.first_skipped}" if self.first_skipped else ""
        path = self.source or None
        if self.rows < MIN_ROWS:
            message = f"it has {self.rows} usable rows{without}; at least {MIN_ROWS} are needed{first}"
            raise DataError(message, path=path)
        for label, side in (("true", self.positives), ("false", self.negatives)):
            if len(side) < MIN_PER_LABEL:
                message = (
                    f"it has {len(side)} usable rows with label {label}{without}; at least {MIN_PER_LABEL} are needed"
                )
                raise DataError(f"{message}{first}", path=path)
        if self.paired and self.positives == self.negatives:
            raise DataError("both sides of every row are the same text; check the columns", path=path)

    def sides(self) -> tuple[list[Example], list[Example]]:
        """The positive and the negative examples, aligned if `paired`."""
        return list(self.positives), list(self.negatives)

    def pairs(self) -> list[tuple[Example, Example]]:
        """(positive, negative) of each row. Raises DataError for unpaired data."""
        if not self.paired:
            raise DataError(f"{self.source}: the rows are not paired; use a method that takes unpaired data")
        return list(zip(self.positives, self.negatives, strict=True))

    def split(
        self, heldout_fraction: float = 0.2, seed: int = 0, *, min_side: int = MIN_SIDE
    ) -> tuple[Preferences, Preferences]:
        """Split the rows into (train, heldout), each in file order. Equal seeds give equal splits.

        Rows with the same prompt stay together, as do rows without a prompt that share a completion, so no held-out
        prompt is trained on. If there are too few prompts for that, rows with the same completion stay together. Each
        part gets at least `min_side` rows, of each label if unpaired. Raises DataError if such a split does not exist.
        """
        if not 0 < heldout_fraction < 1:
            raise DataError(f"the held-out fraction must be between 0 and 1, not {heldout_fraction:g}")
        for by_prompt in (True, False):
            held = self._held_out(heldout_fraction, seed, min_side, by_prompt)
            train, heldout = self.select(set(range(self.rows)) - held), self.select(held)
            if all(size >= min_side for part in (train, heldout) for size in part._sizes(range(part.rows))):
                return train, heldout
        raise DataError(
            f"{self.source}: there are too few different prompts or texts to hold out {min_side} rows"
            f"{'' if self.paired else ' of each label'} and train on as many; add rows with other prompts"
        )

    def shares_prompts(self, other: Preferences) -> bool:
        """Whether a prompt occurs in both."""
        mine, theirs = ({one.prompt for one in (*part.positives, *part.negatives)} for part in (self, other))
        return bool(mine & theirs - {None})

    def items(self) -> list[tuple[Example | None, Example | None]]:
        """One (positive, negative) per row. Unpaired: the positives come first, and the missing side is None."""
        if self.paired:
            return list(zip(self.positives, self.negatives, strict=True))
        return [(one, None) for one in self.positives] + [(None, one) for one in self.negatives]

    def select(self, rows: Collection[int]) -> Preferences:
        """These rows, by their numbers in `items`, in file order."""
        items = [item for row, item in enumerate(self.items()) if row in rows]
        lines = tuple(line for row, line in enumerate(self.lines) if row in rows)
        positives = tuple(positive for positive, _ in items if positive is not None)
        negatives = tuple(negative for _, negative in items if negative is not None)
        weights = tuple(weight for row, weight in enumerate(self.weights) if row in rows)
        return replace(self, positives=positives, negatives=negatives, lines=lines, weights=weights)

    def error(self, row: int, side: Side, message: str) -> DataError:
        """An error in a text of a row, by its number in `items`. It names the line and the column if they are known."""
        positive, negative = self.items()[row]
        text = negative if side == "negative" or positive is None else positive
        assert text is not None
        if not self.lines:
            number = row if self.paired or text is positive else row - len(self.positives)
            name = "negative" if text is negative else "positive"
            return DataError(f"{name} example {number + 1} ({_shown(text)!r}): {message}", path=self.source or None)
        prompt, *sides = self.fields
        field = prompt if side == "prompt" and prompt else sides[text is negative]
        return DataError(message, path=self.source, line=self.lines[row], field=field)

    def _sizes(self, rows: Sequence[int]) -> np.ndarray:
        """The number of rows; if unpaired, of each label."""
        if self.paired:
            return np.array([len(rows)])
        positive = sum(row < len(self.positives) for row in rows)
        return np.array([positive, len(rows) - positive])

    def _held_out(self, fraction: float, seed: int, min_side: int, by_prompt: bool) -> set[int]:
        """The rows of groups chosen at random up to the wanted sizes, then of the smallest until `min_side` is met."""
        wanted = np.maximum(min_side, np.round(fraction * self._sizes(range(self.rows))))
        groups = [(rows, self._sizes(rows)) for rows in self._groups(by_prompt)]
        random.Random(seed).shuffle(groups)
        held, chosen, rest = np.zeros_like(wanted), set[int](), []
        for rows, sizes in groups:
            if (held + sizes <= wanted).all():
                chosen.update(rows)
                held += sizes
            else:
                rest.append((rows, sizes))
        for rows, sizes in sorted(rest, key=lambda group: len(group[0])):
            if ((held < min_side) & (sizes > 0)).any():
                chosen.update(rows)
                held += sizes
        return chosen

    def _groups(self, by_prompt: bool) -> list[list[int]]:
        """Group the rows so that no prompt (or text without a prompt) occurs in two groups; or else no completion."""
        leader = list(range(self.rows))

        def find(row: int) -> int:
            while leader[row] != row:
                leader[row] = row = leader[leader[row]]
            return row

        first: dict[object, int] = {}
        for row, item in enumerate(self.items()):
            for example in item:
                if example is not None:
                    key = example.prompt if by_prompt and example.prompt is not None else (example.completion,)
                    leader[find(row)] = find(first.setdefault(key, row))
        groups = defaultdict(list)
        for row in range(self.rows):
            groups[find(row)].append(row)
        return list(groups.values())


def _shown(example: Example, length: int = 40) -> str:
    """The beginning of a text, for errors."""
    text = " ".join(example.completion.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
