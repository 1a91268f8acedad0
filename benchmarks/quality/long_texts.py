"""What makes steering hold over long texts: ways to apply a direction, at equal effect.

    python -m benchmarks.quality.long_texts [NAME] [--tokens 256] [--texts 2] [--seed 0] [--json FILE]

SmolLM2-135M-Instruct answers the 24 questions of the profile's judge several times each, in texts of up to so many
tokens at temperature 1, at both signs of every strength and with the same random numbers. h is the output of the
profile's block, d its calibrated shift at strength 1, v = d/‖d‖, and t counts generated tokens from 0:

- `constant`: h + αd, as served.
- `decay`: h + αd·max(0, 1 − t/128), a linear schedule.
- `first`: h + αd for t < 48, nothing later.
- `clamp`: h·v is raised to the mean over unsteered texts plus α‖d‖ where it is lower (for α < 0: lowered).
- `scaled`: h + αd‖h‖/n with the median norm n of the fit.

Reported are the share of texts that end by themselves, the share that repeat or run into an endless word (see
`measures/long_texts.py`), perplexity under the unsteered model by position, of every third text, and VADER's compound
score of the first 48 tokens (early) and, as a mean over parts of 48 tokens, of the rest (late; parts of fewer than 16
tokens are left out). The second table interpolates each way between its strengths to the early difference between
both signs that `constant` has at 1. Intervals (95 %) resample questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality.judges import JUDGES
from steering_vectors import Profile, load_model, load_profile
from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.measures.activations import pooled
from steering_vectors.measures.controls import bootstrap
from steering_vectors.measures.long_texts import is_endless, is_repeating
from steering_vectors.measures.sampling import Sampler
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.hooks import block_output, with_block_output
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.runtime.runner import RowInput

WAYS = ("constant", "decay", "first", "clamp", "scaled")
STRENGTHS = (1.0, 2.0)
DECAY_TOKENS = 128
FIRST_TOKENS = 48
PART = 48  # tokens that are judged together
MIN_PART = 16
PERPLEXITY_OF = 3  # every third text
BOUNDARIES = (48, 128, 256, 512, 1024)
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Way:
    """How a row is steered."""

    name: str
    strength: float


@dataclass(frozen=True, slots=True)
class Direction:
    """A profile's shift `[hidden]` at strength 1 at its block, the mean of h·v over unsteered texts, and the median
    norm."""

    layer: int
    shift: torch.Tensor
    mean: float
    norm: float

    def steer(self, hidden: torch.Tensor, ways: Sequence[Way], steps: Sequence[int]) -> torch.Tensor:
        """The steered block outputs of rows `[rows, hidden]` that compute generated token `steps`."""
        return torch.stack([self._row(*row) for row in zip(hidden, ways, steps, strict=True)])

    def _row(self, hidden: torch.Tensor, way: Way, step: int) -> torch.Tensor:
        size, strength = float(self.shift.norm()), way.strength
        if way.name == "clamp" and strength:
            target, along = self.mean + strength * size, float(hidden @ self.shift) / size
            missing = max(0.0, target - along) if strength > 0 else min(0.0, target - along)
            return hidden + missing / size * self.shift
        factor = {
            "decay": max(0.0, 1 - step / DECAY_TOKENS),
            "first": float(step < FIRST_TOKENS),
            "scaled": float(hidden.norm()) / self.norm,
        }.get(way.name, 1.0)
        return hidden + strength * factor * self.shift


class HookedSampler(Sampler):
    """A sampler whose rows are steered by a hook, in the way that belongs to each row's mixture."""

    def write_texts(
        self, lm: LanguageModel, direction: Direction, ways: Mapping[Mixture, Way], rows: Sequence[Tokens], numbers: Any
    ) -> list[list[Tokens]]:
        """The texts of each way."""
        slots: dict[int, Way] = {}
        batch: list[RowInput] = []
        self._bank.watch(lambda row, mixture: slots.update({row: ways[mixture]}) if mixture in ways else None)
        forward = self._runner.forward

        def noted(rows: Sequence[RowInput], *args: Any, **options: Any) -> Any:
            batch[:] = rows
            return forward(rows, *args, **options)

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if any(row.steered_from is None or row.steered_from > row.start for row in batch):
                return None
            hidden = block_output(output)
            found = direction.steer(
                hidden[:, 0], [slots[row.slot] for row in batch], [row.start - (row.steered_from or 0) for row in batch]
            )
            return with_block_output(output, found.unsqueeze(1))

        handle = lm.blocks[direction.layer].register_forward_hook(hook)
        self._runner.forward = noted  # type: ignore[method-assign]
        try:
            return [found.texts for found in self.sample(list(ways), rows, numbers)]
        finally:
            self._runner.forward = forward  # type: ignore[method-assign]
            handle.remove()


@contextmanager
def hooked(lm: LanguageModel, longest: int) -> Iterator[HookedSampler]:
    sampler = HookedSampler(lm, context=Sampler.context_for(lm, longest))
    try:
        yield sampler
    finally:
        sampler.close()


@dataclass(frozen=True, slots=True)
class Figures:
    """One way at one strength: `perplexity` by the bin's last token, scores with intervals, and how many texts have a
    late score."""

    way: str
    strength: float
    texts: int
    ended: float
    repeating: float
    perplexity: dict[int, float]
    early: float
    early_95: tuple[float, float]
    late: float
    late_95: tuple[float, float]
    late_texts: int
    example: str


def main(
    name: Annotated[str, typer.Argument(help="A shipped profile with a judge and one block.")] = "cheerful",
    tokens: Annotated[int, typer.Option(help="Tokens of a text, at most.")] = 256,
    texts: Annotated[int, typer.Option(help="Texts of each question.")] = 2,
    ways: Annotated[str, typer.Option(help="Which ways, comma-separated.")] = ",".join(WAYS),
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    lm = load_model("smollm2")
    profile = load_profile(shipped_profiles(lm.identity)[name])
    prompts = [encode_prompt(lm.tokenizer, [Message("user", one)]) for one in JUDGES[name].prompts(Path())]
    rows = [prompt for prompt in prompts for _ in range(texts)]
    found: list[Figures] = []
    with steerable(lm) as steered:
        for one in measure(steered, profile, rows, ways.split(","), texts, tokens, seed):
            found.append(one)
            print(json.dumps(asdict(one) | {"example": ""}), flush=True)
            if out is not None:
                out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    show(found, f"{name}, {len(rows)} texts of up to {tokens} tokens at each strength, seed {seed}")


def measure(
    steered: SteeredModel,
    profile: Profile,
    rows: Sequence[Tokens],
    names: Sequence[str],
    each: int,
    tokens: int,
    seed: int,
) -> Iterator[Figures]:
    """The figures of the unsteered model, then of every way at both signs of every strength. Each prompt stands
    `each` times in `rows`."""
    lm = steered.lm
    (layer,) = profile.layers
    shift = profile.unit * profile.injected()[layer].to(lm.dtype)
    numbers = torch.rand(len(rows), tokens, generator=torch.Generator().manual_seed(seed))
    with hooked(lm, max(map(len, rows)) + tokens) as sampler:
        plain = Way("unsteered", 0.0)
        write = partial(sampler.write_texts, lm, rows=rows, numbers=numbers)
        still = Direction(layer, torch.zeros_like(shift), 0.0, 1.0)
        (written,) = write(still, {_neutral(profile): plain})
        yield figures(steered, plain, rows, written, each)
        examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(rows, written, strict=True)]
        means = torch.cat([part.vectors[:, 0].float().cpu() for part in pooled(lm, examples, [layer])])
        mean = float((means @ shift.float()).mean() / shift.float().norm())
        direction = Direction(layer, shift, mean, profile.residual_norms[layer])
        for name in names:
            steerings = [Way(name, sign * strength) for strength in STRENGTHS for sign in (-1, 1)]
            ways = {_neutral(profile): way for way in steerings}
            for way, one in zip(steerings, write(direction, ways), strict=True):
                yield figures(steered, way, rows, one, each)


def _neutral(profile: Profile) -> Mixture:
    """A mixture that changes nothing and equals no other."""
    return Mixture((Term(profile, 0.0),))


def figures(steered: SteeredModel, way: Way, rows: Sequence[Tokens], texts: Sequence[Tokens], each: int) -> Figures:
    decode, ends = partial(steered.lm.tokenizer.decode, skip_special_tokens=True), eos_ids(steered.lm)
    score = JUDGES["cheerful"].score
    early = np.array([score(decode(text[:PART])) for text in texts])
    late = np.array([_late(text, lambda part: score(decode(part))) for text in texts])
    examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(rows, texts, strict=True)]
    grouped = early.reshape(-1, each), late.reshape(-1, each)
    return Figures(
        way.name,
        way.strength,
        len(texts),
        float(np.mean([bool(text) and text[-1] in ends for text in texts])),
        float(np.mean([is_repeating(text) or is_endless(text, decode) for text in texts])),
        perplexities(steered, examples[::PERPLEXITY_OF]),
        float(early.mean()),
        bootstrap(lambda chosen: float(grouped[0][chosen].mean()), len(grouped[0])),
        _mean(late),
        bootstrap(lambda chosen: _mean(grouped[1][chosen]), len(grouped[1])),
        int(np.isfinite(late).sum()),
        " ".join(decode(texts[0]).split()),
    )


def _mean(scores: np.ndarray) -> float:
    """The mean of those that exist; NaN if there is none."""
    there = scores[np.isfinite(scores)]
    return float(there.mean()) if there.size else math.nan


def _late(text: Tokens, score: Any) -> float:
    """The mean score of the parts behind the first one; NaN if there is none."""
    parts = [text[start : start + PART] for start in range(PART, len(text), PART)]
    scores = [score(part) for part in parts if len(part) >= MIN_PART]
    return float(np.mean(scores)) if scores else math.nan


def perplexities(steered: SteeredModel, examples: Sequence[Encoded]) -> dict[int, float]:
    """Perplexity under the unsteered model, by the last token of each bin of positions."""
    longest = max(len(ids) - start for ids, start in examples)
    sums, counts = torch.zeros(2, longest, dtype=torch.float64)
    for scored in steered.scored(examples):
        steps = scored.valid.nonzero()[:, 1].cpu()
        logs = steered.chosen(steered.final(scored, False), scored.targets).double().cpu()
        sums.index_add_(0, steps, logs)
        counts.index_add_(0, steps, torch.ones_like(logs))
    bounds = [0, *(one for one in BOUNDARIES if one < longest), longest]
    return {end: math.exp(-float(sums[start:end].sum() / counts[start:end].sum())) for start, end in pairwise(bounds)}


def at_equal_effect(found: Sequence[Figures], way: str, effect: float) -> dict[str, float] | None:
    """The figures of a way at the strength where early scores at both signs differ by `effect`, interpolated between
    its strengths and 0; None if it does not reach that. Figures are the worse of both signs."""
    plain = next(one for one in found if one.way == "unsteered")
    points = [_both(0.0, plain, plain)]
    own = {one.strength: one for one in found if one.way == way}
    points += [_both(strength, own[-strength], own[strength]) for strength in STRENGTHS if strength in own]
    for low, high in pairwise(points):
        if low["effect"] <= effect <= high["effect"]:
            share = (effect - low["effect"]) / max(high["effect"] - low["effect"], 1e-9)
            return {name: low[name] + share * (high[name] - low[name]) for name in low}
    return None


def _both(strength: float, below: Figures, above: Figures) -> dict[str, float]:
    return {
        "strength": strength,
        "effect": above.early - below.early,
        "late effect": above.late - below.late,
        "ended": min(below.ended, above.ended),
        "repeating": max(below.repeating, above.repeating),
        **{
            f"perplexity to {end}": max(below.perplexity[end], above.perplexity[end])
            for end in below.perplexity.keys() & above.perplexity.keys()
        },
    }


def show(found: Sequence[Figures], title: str) -> None:
    ends = sorted({end for one in found for end in one.perplexity})
    table = Table("way", "strength", "ended", "repeating", "early", "late (texts)", title=title)
    for end in ends:
        table.add_column(f"perplexity to {end}")
    for one in found:
        table.add_row(
            one.way,
            f"{one.strength:+g}",
            f"{one.ended:.0%}",
            f"{one.repeating:.0%}",
            "{:.2f} ({:.2f} to {:.2f})".format(one.early, *one.early_95),
            "{:.2f} ({:.2f} to {:.2f}; {})".format(one.late, *one.late_95, one.late_texts),
            *(f"{one.perplexity[end]:.1f}" if end in one.perplexity else "" for end in ends),
        )
    console = Console(width=140)
    console.print(table)
    constant = {one.strength: one for one in found if one.way == "constant"}
    if 1.0 not in constant:
        return
    effect = constant[1.0].early - constant[-1.0].early
    ways = dict.fromkeys(one.way for one in found if one.way != "unsteered")
    equal = {way: one for way in ways if (one := at_equal_effect(found, way, effect)) is not None}
    columns = list(equal["constant"])
    table = Table("way", *columns, title=f"at an early difference of {effect:.2f} between both signs, the worse sign")
    for way, one in equal.items():
        table.add_row(way, *(f"{one[column]:.2f}" if column in one else "" for column in columns))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
