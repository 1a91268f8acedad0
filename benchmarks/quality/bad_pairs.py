"""How well the figures that a fit reads from its data foretell the effect of its profile, on data of known quality.

    python -m benchmarks.quality.bad_pairs --out DIR [--summary]

Data sets of known quality are made from the demo model's four manners: all rows, a few, or very few, with 0 to 50 % of
the labels shuffled; random texts as pairs; unpaired rows; and mixtures with pairs of short and long replies. A mean
difference at one block is brought to the same KL for each of them. Its effect from strength −1 to +1 is measured on
held-out rows: the margin of clean pairs, the share of replies in the manner (by the rule-based judge), and the length
of replies. `effect` is the mean of the first two, each as a share of what the manner's clean rows reach. Figures of the
data are then ranked against the effects. Intervals (95 %) resample the data sets.

The activations and each data set's effects are files in DIR. A second run measures only what is missing; `--summary`
measures nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.quality.dose_response import MANNERS, PREFERENCES, heldout_prompts, messages
from benchmarks.quality.manners import judge
from steering_vectors import Profile, load_model, load_pairs
from steering_vectors.data.chat import encode_prompt
from steering_vectors.data.corpus import Sides, encode_corpus
from steering_vectors.fitting.calibration import largest_coefficient, search
from steering_vectors.fitting.fit import MIN_SIGNIFICANCE
from steering_vectors.measures.activations import LayerStatistics, capture
from steering_vectors.measures.controls import bootstrap
from steering_vectors.measures.data_quality import Lengths, quality_at
from steering_vectors.measures.steered_model import KeptTexts, SteeredModel, eos_ids, steerable
from steering_vectors.models.loading import LanguageModel

BLOCK = 5
KL_BUDGET = 0.1
START = 0.5  # norm ratio at which each search for the budget begins
PROMPTS, TOKENS = 64, 100  # replies
HELDOUT = 64  # pairs
TEXTS, TEXT_TOKENS = 64, 32  # of the unsteered model, on which KL is measured
SIZES = {  # rows, and the shares of swapped labels
    "all": (384, (0.0, 0.1, 0.3, 0.4, 0.45, 0.5)),
    "half": (192, (0.0, 0.5)),
    "few": (48, (0.0, 0.1, 0.3, 0.4, 0.45, 0.5)),
    "very few": (16, (0.0, 0.3, 0.5)),
}
FULL, UNPAIRED = 384, 96
LENGTH_MANNER = "concise"
FIGURES = ("agreement", "significance", "reproducibility", "separation")
LENGTH_FIGURES = ("length alone", "correlation", "explained")
WORKS = 0.5  # of the effect of the manner's clean rows
DRAWS = 1000

Key = tuple[str, int, int]  # manner, row and side (0: preferred) of a text


@dataclass(frozen=True, slots=True)
class DataSet:
    """Texts of both sides, and the manner that the profile is meant to have."""

    manner: str
    kind: str
    positives: tuple[Key, ...]
    negatives: tuple[Key, ...]
    flipped: float = 0.0
    paired: bool = True

    @property
    def name(self) -> str:
        return f"{self.manner}-{self.kind.replace(' ', '-')}-{self.flipped:.0%}".replace("%", "")


def data_sets(rows: int) -> Iterator[DataSet]:
    """All data sets, from files of this many rows."""
    for manner in MANNERS:
        for kind, (count, shares) in SIZES.items():
            drawn = random.Random(f"{manner} {kind}").sample(range(rows), count)
            for share in shares:
                yield flipped(DataSet(manner, kind, *both(manner, drawn)), share)
        yield from (random_pairs(manner, rows, kind) for kind in ("random texts", "other random texts"))
        drawn = random.Random(f"{manner} unpaired").sample(range(rows), 2 * UNPAIRED)
        unpaired = both(manner, drawn[:UNPAIRED])[0], both(manner, drawn[UNPAIRED:])[1]
        for share in (0.0, 0.3, 0.5):
            yield flipped(DataSet(manner, "unpaired", *unpaired, paired=False), share)
        if manner != LENGTH_MANNER:
            for part in (1, 2, 3):
                drawn = random.Random(f"{manner} mixed").sample(range(rows), FULL)
                own, other = both(manner, drawn[part * FULL // 4 :]), both(LENGTH_MANNER, drawn[: part * FULL // 4])
                yield DataSet(manner, f"{part} of 4 by length", own[0] + other[0], own[1] + other[1])


def both(manner: str, rows: Sequence[int]) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    return tuple((manner, row, 0) for row in rows), tuple((manner, row, 1) for row in rows)


def flipped(data: DataSet, share: float) -> DataSet:
    """The data with the sides of a share of its rows swapped; if unpaired, rows of both sides change their label."""
    count = round(share * len(data.positives))
    swapped = set(random.Random(data.name).sample(range(len(data.positives)), count))
    pairs = [
        (other, one) if row in swapped else (one, other)
        for row, (one, other) in enumerate(zip(data.positives, data.negatives, strict=True))
    ]
    positives, negatives = zip(*pairs, strict=True)
    return replace(data, positives=positives, negatives=negatives, flipped=share)


def random_pairs(manner: str, rows: int, kind: str) -> DataSet:
    """Each side of a pair is any response of the manner's file."""
    keys = [(manner, row, side) for row in range(rows) for side in (0, 1)]
    drawn = random.Random(f"{manner} {kind.removesuffix(' texts')}").sample(keys, 2 * FULL)
    return DataSet(manner, kind, tuple(drawn[:FULL]), tuple(drawn[FULL:]))


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """Pooled activations and lengths of every training text."""

    vectors: Mapping[Key, torch.Tensor]  # [hidden]
    tokens: Mapping[Key, int]
    characters: Mapping[Key, int]
    residual_norm: float

    def statistics(self, data: DataSet) -> LayerStatistics:
        sides = [torch.stack([self.vectors[key] for key in side]) for side in (data.positives, data.negatives)]
        means = [side.double().mean(0) for side in sides]
        rows = tuple(tuple(range(len(side))) for side in sides)
        return LayerStatistics(
            means[0], means[1], sides[0], sides[1], self.residual_norm, data.paired, (rows[0], rows[1])
        )

    def figures(self, data: DataSet) -> dict[str, float]:
        tokens, characters = (
            Lengths.of([of[key] for key in data.positives], [of[key] for key in data.negatives], data.paired)
            for of in (self.tokens, self.characters)
        )
        found = quality_at(BLOCK, self.statistics(data), tokens, characters)
        return {
            "agreement": found["agreement"],
            "significance": found["significance"],
            "reproducibility": found["reproducibility"],
            "separation": found["separation"],
            "length alone": abs(2 * found["length"]["longer_tokens"] - 1),
            "correlation": found["length"]["correlation"],
            "explained": found["length"]["explained"],
        }


def read(lm: LanguageModel, file: Path) -> Readings:
    """One pass over the training texts of all manners, or what an earlier run stored."""
    if not file.exists():
        torch.save(_read(lm), file)
    return Readings(*torch.load(file))


def _read(lm: LanguageModel) -> tuple[dict[Key, torch.Tensor], dict[Key, int], dict[Key, int], float]:
    vectors: dict[Key, torch.Tensor] = {}
    tokens: dict[Key, int] = {}
    characters: dict[Key, int] = {}
    norms = []
    for manner in MANNERS:
        pairs = load_pairs(PREFERENCES / f"{manner}.train.jsonl")
        sides = encode_corpus(lm.tokenizer, pairs, limit=None).sides()
        found = capture(lm, sides.positives, sides.negatives, [BLOCK], paired=True)[BLOCK]
        norms.append(found.residual_norm)
        for side, (pooled, encoded, texts) in enumerate(
            zip((found.positives, found.negatives), (sides.positives, sides.negatives), pairs.sides(), strict=True)
        ):
            for row, (vector, (ids, start), text) in enumerate(zip(pooled, encoded, texts, strict=True)):
                key = manner, row, side
                vectors[key], tokens[key], characters[key] = vector.clone(), len(ids) - start, len(text.completion)
    return vectors, tokens, characters, sum(norms) / len(norms)


class HeldOut:
    """What a manner's effects are measured on: clean pairs, prompts, and texts of the unsteered model."""

    def __init__(self, steered: SteeredModel, manner: str) -> None:
        self._steered, self._manner, lm = steered, manner, steered.lm
        file = PREFERENCES / f"{manner}.heldout.jsonl"
        self._prompts = [encode_prompt(lm.tokenizer, messages(one)) for one in heldout_prompts(file, PROMPTS)]
        pairs = load_pairs(file)
        self._sides: Sides = encode_corpus(lm.tokenizer, pairs.select(set(range(HELDOUT))), limit=None).sides()

    @cached_property
    def _pairs(self) -> KeptTexts:
        return self._steered.kept([*self._sides.positives, *self._sides.negatives], [BLOCK])

    @cached_property
    def _texts(self) -> KeptTexts:
        rows = [self._prompts[i % len(self._prompts)] for i in range(TEXTS)]
        with torch.no_grad():
            self._steered.write(_blank(self._steered.lm), 0.0)
            return self._steered.kept(self._steered.continuations(rows, tokens=TEXT_TOKENS, seed=0), [BLOCK])

    def effects(self, profile: Profile) -> dict[str, float]:
        def kl_at(unit: float) -> float:
            self._steered.write(replace(profile, unit=unit), 1.0)
            sums, counts = self._texts.divergences(BLOCK)
            return float(sums.sum() / counts.sum())

        largest = largest_coefficient(profile)
        reached = search(kl_at, largest, KL_BUDGET, start=START * largest, tolerance=0.02, evaluations=10)
        profile = replace(profile, unit=reached.coefficient)
        margins, shares, words = {}, {}, {}
        for strength in (-1.0, 1.0):
            self._steered.write(profile, strength)
            sums, _ = self._pairs.log_likelihoods(BLOCK, steer=True)
            margins[strength] = sums[:HELDOUT] - sums[HELDOUT:]
            replies = self._steered.sample(self._prompts, tokens=TOKENS, seed=0)
            texts = self._steered.lm.tokenizer.batch_decode(replies, skip_special_tokens=True)
            ends = eos_ids(self._steered.lm)
            marks = [judge(self._manner, text, ended=ids[-1] in ends) for text, ids in zip(texts, replies, strict=True)]
            shares[strength] = sum(marks) / len(marks)
            words[strength] = sum(len(text.split()) for text in texts) / len(texts)
        moved = margins[1.0] - margins[-1.0]
        return {
            "kl": reached.kl,
            "norm ratio": reached.coefficient / largest,
            "margin": float(moved.mean()),
            "moved": float((moved > 0).double().mean()),
            "share": shares[1.0] - shares[-1.0],
            "length": math.log(words[1.0] / words[-1.0]),
        }


def _blank(lm: LanguageModel) -> Profile:
    return Profile(name="blank", model=lm.identity, directions={BLOCK: torch.ones(lm.hidden_size)}, method="mean-diff")


def main(
    out: Annotated[Path, typer.Option(help="Directory of the results.")],
    summary: Annotated[bool, typer.Option("--summary", help="Measure nothing, only read the results.")] = False,
) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    lm = load_model("demo")
    rows = load_pairs(PREFERENCES / f"{MANNERS[0]}.train.jsonl").rows
    readings, wanted = read(lm, out / "readings.pt"), list(data_sets(rows))
    if not summary:
        measure(lm, readings, [data for data in wanted if not result(out, data).exists()], out)
    show(
        [
            Cell(data, readings.figures(data), json.loads(result(out, data).read_text()))
            for data in wanted
            if result(out, data).exists()
        ]
    )


def result(out: Path, data: DataSet) -> Path:
    return out / f"{data.name}.json"


def measure(lm: LanguageModel, readings: Readings, missing: Sequence[DataSet], out: Path) -> None:
    with steerable(lm) as steered:
        heldout = {manner: HeldOut(steered, manner) for manner in {data.manner for data in missing}}
        for data in track(missing, description="data sets"):
            statistics = readings.statistics(data)
            profile = replace(
                _blank(lm),
                directions={BLOCK: statistics.difference.float()},
                residual_norms={BLOCK: statistics.residual_norm},
            )
            found = heldout[data.manner].effects(profile)
            result(out, data).write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Cell:
    """A data set with its figures and its effects."""

    data: DataSet
    figures: Mapping[str, float]
    effects: Mapping[str, float]

    @property
    def confounded(self) -> bool:
        return "length" in self.data.kind

    @property
    def rings(self) -> bool:
        return self.figures["significance"] < MIN_SIGNIFICANCE


def with_effect(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with `effect`, which compares each with its manner's clean rows."""
    clean = {cell.data.manner: cell.effects for cell in cells if (cell.data.kind, cell.data.flipped) == ("all", 0.0)}

    def effect(cell: Cell) -> float:
        return sum(cell.effects[name] / clean[cell.data.manner][name] for name in ("share", "margin")) / 2

    return [replace(cell, effects={**cell.effects, "effect": effect(cell)}) for cell in cells]


def overall(cells: Sequence[Cell], figure: str, effect: str) -> float:
    return rank_correlation([(cell.figures[figure], cell.effects[effect]) for cell in cells])


def within(cells: Sequence[Cell], figure: str, effect: str, group: Callable[[Cell], object]) -> float:
    """The mean over groups of at least three cells."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(group(cell), []).append(cell)
    return float(np.nanmean([overall(one, figure, effect) for one in groups.values() if len(one) > 2]))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's; NaN if all values of one kind are equal."""
    one, other = (np.array(values) for values in zip(*pairs, strict=True))
    return float(spearmanr(one, other).statistic) if np.ptp(one) > 0 and np.ptp(other) > 0 else math.nan


def with_interval(cells: Sequence[Cell], statistic: Callable[[Sequence[Cell]], float]) -> str:
    low, high = bootstrap(lambda drawn: statistic([cells[i] for i in drawn]), len(cells), draws=DRAWS)
    return f"{statistic(cells):.2f} ({low:.2f} to {high:.2f})"


def show(cells: Sequence[Cell]) -> None:
    cells, console = with_effect(cells), Console(width=170)
    table = Table(
        "manner", "data", "rows", "swapped", *FIGURES, *LENGTH_FIGURES, "share", "margin", "effect", "length",
        title="Data sets",
    )  # fmt: skip
    for cell in cells:
        figures = [f"{cell.figures[name]:.2f}" for name in (*FIGURES, *LENGTH_FIGURES)]
        effects = [f"{cell.effects[name]:.2f}" for name in ("share", "margin", "effect", "length")]
        data = cell.data
        table.add_row(data.manner, data.kind, str(len(data.positives)), f"{data.flipped:.0%}", *figures, *effects)
    console.print(table)
    console.print(ranking([cell for cell in cells if not cell.confounded], "without mixtures by length"))
    console.print(ranking(cells, "all data sets"))
    plain = [cell for cell in cells if not cell.confounded]
    for name, group in (("at or above", False), ("below", True)):
        effects = sorted(cell.effects["effect"] for cell in plain if cell.rings is group)
        works = sum(effect >= WORKS for effect in effects)
        console.print(
            f"significance {name} {MIN_SIGNIFICANCE:g}: {works} of {len(effects)} sets reach {WORKS:.0%} of the effect "
            f"of clean rows; from {effects[0]:.2f} to {effects[-1]:.2f}, median {effects[len(effects) // 2]:.2f}"
        )
    sound = [cell for cell in cells if not cell.rings]
    for name, meant in (("pairs that differ in length, or mixtures with them", True), ("other pairs", False)):
        some = [cell for cell in sound if (cell.confounded or cell.data.manner == LENGTH_MANNER) is meant]
        explained = [cell.figures["explained"] for cell in some]
        moved = [abs(cell.effects["length"]) for cell in some]
        console.print(
            f"{name}: length explains {min(explained):.2f} to {max(explained):.2f}; "
            f"replies change by a factor of {math.exp(min(moved)):.2f} to {math.exp(max(moved)):.2f}"
        )


def ranking(cells: Sequence[Cell], title: str) -> Table:
    table = Table(
        "figure", "effect", "share", "margin", "effect, within a manner", "effect, across swapped shares",
        title=f"Spearman's correlation, {title} ({len(cells)})",
    )  # fmt: skip
    for figure in FIGURES:
        found = [
            with_interval(cells, lambda some, figure=figure, effect=effect: overall(some, figure, effect))
            for effect in ("effect", "share", "margin")
        ]
        found += [
            with_interval(cells, lambda some, figure=figure, group=group: within(some, figure, "effect", group))
            for group in (lambda cell: cell.data.manner, lambda cell: (cell.data.manner, cell.data.kind))
        ]
        table.add_row(figure, *found)
    return table


if __name__ == "__main__":
    typer.run(main)
