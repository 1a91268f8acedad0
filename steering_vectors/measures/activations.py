"""Statistics of block outputs over preferred and rejected responses.

For each block: the mean of each side, a seeded sample of pooled vectors, and the median norm. Memory is bounded for any
number of rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS, Batch, Encoded
from steering_vectors.errors import FitError
from steering_vectors.measures.passes import batches_for, prompt_cache, run
from steering_vectors.models.hooks import record, stopping_after
from steering_vectors.models.loading import LanguageModel
from steering_vectors.progress import Progress

Tokens = Literal["response", "last"]

SAMPLE_ROWS = 4096  # maximum number of pooled vectors per side
SAMPLE_BYTES = 2**30  # maximum for all blocks together
CHECK_ROWS = 512  # the same, where only the data's quality is read
CHECK_BYTES = 2**26


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """The vectors of one batch: `vectors[r, k]` is example `indices[r]`, pooled at the k-th layer."""

    indices: tuple[int, ...]
    vectors: torch.Tensor  # [rows, layers, hidden] float32
    norms: torch.Tensor  # [layers, response tokens] float32: ‖h‖


@dataclass(frozen=True, slots=True, eq=False)
class LayerStatistics:
    """The statistics of one block.

    The means are over all examples. `positives` and `negatives` are a sample of the pooled vectors, or all of them if
    they are few. If `paired`, row i of both belongs to one pair. `residual_norm` is the median ‖h‖ over the response
    tokens of both sides. `sampled` are the examples of each side that the sample's rows belong to.

    If some examples count more than others, the means are weighted, `sample_weights` are the weights of the sample's
    rows, and `unweighted` is the difference of the means in which all examples count alike.
    """

    positive_mean: torch.Tensor  # [hidden] float64
    negative_mean: torch.Tensor  # [hidden] float64
    positives: torch.Tensor  # [sample, hidden] float32
    negatives: torch.Tensor  # [sample, hidden] float32
    residual_norm: float
    paired: bool
    sampled: tuple[Sequence[int], Sequence[int]] = ((), ())
    sample_weights: tuple[torch.Tensor, torch.Tensor] | None = None  # [sample] float64 each
    unweighted: torch.Tensor | None = None  # [hidden] float64

    @property
    def difference(self) -> torch.Tensor:
        """mean(h⁺) − mean(h⁻), float64 `[hidden]`."""
        return self.positive_mean - self.negative_mean

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each row of the sample, with mean 1 on each side: float64 `[sample]` each."""
        if self.sample_weights is None:
            return torch.ones(len(self.positives)).double(), torch.ones(len(self.negatives)).double()
        first, second = self.sample_weights
        return first / first.mean(), second / second.mean()


class NormHistogram:
    """A running median of positive numbers in fixed memory: counts in bins of equal ratio (1.1 %), interpolated.

    For a smooth distribution, the error is far below the width of a bin.
    """

    PER_OCTAVE = 64
    OCTAVES = 80  # from 2^-40 to 2^40

    def __init__(self) -> None:
        self._counts = torch.zeros(self.PER_OCTAVE * self.OCTAVES, dtype=torch.int64)

    def add(self, values: torch.Tensor) -> None:
        octaves = values.flatten().double().cpu().clamp_min(2.0**-self.OCTAVES).log2() + self.OCTAVES / 2
        bins = (octaves * self.PER_OCTAVE).floor().long().clamp(0, len(self._counts) - 1)
        self._counts += torch.bincount(bins, minlength=len(self._counts))

    def median(self) -> float:
        """The median of the counted values, or 0 if there are none."""
        total = int(self._counts.sum())
        if total == 0:
            return 0.0
        below = self._counts.cumsum(0)
        place = int(torch.searchsorted(below, torch.tensor(total / 2)))
        inside = (total / 2 - (int(below[place]) - int(self._counts[place]))) / int(self._counts[place])
        return float(2 ** ((place + inside) / self.PER_OCTAVE - self.OCTAVES / 2))


def pooled(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    layers: Sequence[int],
    *,
    tokens: Tokens = "response",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
    stage: str = "capture",
) -> Iterator[Pooled]:
    """Yield block outputs pooled over each example's response: their mean, or the last one with `tokens="last"`.

    `layers` must ascend; the vectors have the same order. Batches come longest first, not in the order of the examples.
    Outputs are read with hooks, because the last of transformers' `hidden_states` has passed the final norm.
    """
    done = 0
    for batch in batches_for(lm, examples, batch_tokens):
        yield _pooled(lm, batch, layers, tokens)
        done += len(batch.indices)
        if progress is not None:
            progress(stage, done, len(examples))


def capture(
    lm: LanguageModel,
    positives: Sequence[Encoded],
    negatives: Sequence[Encoded],
    layers: Sequence[int],
    *,
    paired: bool,
    tokens: Tokens = "response",
    keep_sample: bool = True,
    seed: int = 0,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[int, LayerStatistics]:
    """Statistics of both sides at the given blocks, in one pass over the examples. `weights` says how much each
    example of either side counts in the means; without them all count alike.

    The sample is drawn from `seed`. It has at most SAMPLE_ROWS examples per side, and fewer if the samples of all
    blocks would exceed SAMPLE_BYTES. Without `keep_sample` it has at most CHECK_ROWS, at as many evenly spaced blocks
    as fit into CHECK_BYTES, and is empty at the others. Raises FitError, with the block, if an activation is not
    finite.
    """
    layers = sorted(set(layers))
    draw = random.Random(seed)
    if keep_sample:
        places, size = list(range(len(layers))), min(SAMPLE_ROWS, SAMPLE_BYTES // _bytes(1, len(layers), lm))
    else:
        size = min(CHECK_ROWS, max(len(positives), len(negatives)))
        places = _spaced(len(layers), CHECK_BYTES // _bytes(size, 1, lm))
    kept = _kept(len(positives), size, draw)
    others = kept if paired else _kept(len(negatives), size, draw)
    slots = {row: slot for slot, row in enumerate([*kept, *(len(positives) + row for row in others)])}
    sample = torch.zeros(len(places), len(slots), lm.hidden_size)
    sums = torch.zeros(2, len(layers), lm.hidden_size, dtype=torch.float64)
    plain = torch.zeros_like(sums)
    counted = None if weights is None else [*weights[0], *weights[1]]
    histograms = [NormHistogram() for _ in layers]
    examples = [*positives, *negatives]
    for part in pooled(lm, examples, layers, tokens=tokens, batch_tokens=batch_tokens, progress=progress):
        _check_finite(part, layers)
        for index, vectors in zip(part.indices, part.vectors.cpu(), strict=True):  # [layers, hidden]
            side = int(index >= len(positives))
            if counted is None:
                sums[side] += vectors
            else:
                sums[side] += counted[index] * vectors.double()
                plain[side] += vectors
            if index in slots:
                sample[:, slots[index]] = vectors[places]
        for histogram, norms in zip(histograms, part.norms.cpu(), strict=True):
            histogram.add(norms)
    sizes = [max(len(examples), 1) for examples in (positives, negatives)]
    totals = sizes if weights is None else [sum(side) or 1 for side in weights]
    means = [sums[side] / totals[side] for side in (0, 1)]
    unweighted = None if weights is None else plain[0] / sizes[0] - plain[1] / sizes[1]
    drawn = None if weights is None else _drawn(weights, (kept, others))
    found = {}
    for k, layer in enumerate(layers):
        own = sample[places.index(k)] if k in places else sample.new_zeros(0, lm.hidden_size)
        sampled = (kept, others) if k in places else ((), ())
        sides = own[: len(kept)], own[len(kept) :]
        found[layer] = LayerStatistics(
            means[0][k],
            means[1][k],
            *sides,
            histograms[k].median(),
            paired,
            sampled,
            drawn if k in places else None,
            None if unweighted is None else unweighted[k],
        )
    return found


def _drawn(
    weights: tuple[Sequence[float], Sequence[float]], rows: tuple[Sequence[int], Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the sample's rows, float64 `[sample]` of each side."""
    first, second = (
        torch.tensor([side[row] for row in chosen], dtype=torch.float64)
        for side, chosen in zip(weights, rows, strict=True)
    )
    return first, second


def _bytes(rows: int, layers: int, lm: LanguageModel) -> int:
    """The size of a sample of `rows` examples per side."""
    return 2 * 4 * max(rows, 1) * max(layers, 1) * lm.hidden_size


def _spaced(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to count − 1, at least one, evenly spaced and in the middle of their parts."""
    number = min(count, max(most, 1))
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]


def _kept(rows: int, size: int, draw: random.Random) -> list[int]:
    return list(range(rows)) if rows <= size else sorted(draw.sample(range(rows), size))


def _pooled(lm: LanguageModel, batch: Batch, layers: Sequence[int], tokens: Tokens) -> Pooled:
    """One pass over a batch. Each block's output is pooled as soon as it is there."""
    response = batch.response.unsqueeze(-1)

    def pool(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [rows, positions, hidden]
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)[batch.response]
        if tokens == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), batch.lengths - 1].float(), norms
        return hidden.float().masked_fill(~response, 0).sum(1) / response.sum(1), norms

    cache = prompt_cache(lm, batch)
    with torch.no_grad(), record(lm.blocks, layers, pool) as outputs, stopping_after(lm.blocks[max(layers)]):
        run(lm, batch, cache)
    vectors, norms = zip(*(outputs[layer] for layer in layers), strict=True)
    return Pooled(batch.indices, torch.stack(vectors, dim=1), torch.stack(norms))


def _check_finite(part: Pooled, layers: Sequence[int]) -> None:
    for k, layer in enumerate(layers):
        if not bool(torch.isfinite(part.vectors[:, k]).all()):
            raise FitError(
                f"block {layer}'s output is not finite for some examples: load the model with a wider dtype "
                "(bfloat16 or float32)"
            )
