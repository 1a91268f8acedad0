"""Figures of preference data that say how reliable a direction from it will be, from activations of the training rows.

They describe the difference of means in which all rows count alike, whatever the method and the weights, and need no
pass over the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from steering_vectors.data.corpus import Corpus, spread
from steering_vectors.measures.activations import CHECK_ROWS, LayerStatistics
from steering_vectors.profiles.metadata import DataQuality, LengthQuality


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """The lengths of all training responses, float64 `[examples]`. If `paired`, entry i of both is one pair."""

    positives: torch.Tensor
    negatives: torch.Tensor
    paired: bool

    @classmethod
    def of(cls, positives: Sequence[int], negatives: Sequence[int], paired: bool) -> Lengths:
        return cls(torch.tensor(positives).double(), torch.tensor(negatives).double(), paired)

    @property
    def preferred_longer(self) -> float:
        """The share of pairs whose preferred response is the longer one, ties as a half; for unpaired data, of all
        pairs across the sides."""
        if self.paired:
            return float((1 + (self.positives - self.negatives).sign()).mean()) / 2
        ordered = self.negatives.sort().values
        below = torch.searchsorted(ordered, self.positives) + torch.searchsorted(ordered, self.positives, right=True)
        return float(below.double().mean()) / (2 * len(ordered))


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The projection of each sampled example on the mean difference of the training data without its own row, up to a
    common factor: float64 `[sample]`."""

    positives: torch.Tensor
    negatives: torch.Tensor

    @property
    def gap(self) -> float:
        return float(self.positives.mean() - self.negatives.mean())

    @property
    def separation(self) -> float:
        """d′: the gap in standard deviations within a side."""
        spread_within = ((self.positives.var() + self.negatives.var()) / 2).sqrt()
        return self.gap / float(spread_within) if spread_within > 0 else 0.0


def data_quality(statistics: Mapping[int, LayerStatistics], train: Corpus, layers: Sequence[int]) -> DataQuality | None:
    """The figures of the training data at one block: of those with a sample, the one nearest to the middle of `layers`.

    Returns None if no block has a sample of two examples of each side.
    """
    middle = sum(layers) / len(layers)
    usable = [k for k, one in statistics.items() if min(len(one.positives), len(one.negatives)) > 1]
    if not usable:
        return None
    layer = min(usable, key=lambda k: (abs(k - middle), k))
    sides, pairs = train.sides(), train.pairs
    positives, negatives = ([len(ids) - start for ids, start in side] for side in (sides.positives, sides.negatives))
    tokens = Lengths.of(positives, negatives, pairs.paired)
    positives, negatives = ([len(one.completion) for one in side] for side in pairs.sides())
    return quality_at(layer, statistics[layer], tokens, Lengths.of(positives, negatives, pairs.paired))


def quality_at(layer: int, statistics: LayerStatistics, tokens: Lengths, characters: Lengths) -> DataQuality:
    """The figures at a block, from at most CHECK_ROWS of its sample. Rows may have any order."""
    sample = _Sample(statistics, (len(tokens.positives), len(tokens.negatives)))
    scores = sample.scores()
    return {
        "layer": layer,
        "rows": sample.rows,
        "agreement": sample.agreement(),
        "significance": sample.significance(),
        "reproducibility": sample.reproducibility(),
        "separation": scores.separation,
        "length": length_quality(scores, sample.own(tokens), tokens, characters),
    }


def length_quality(scores: Scores, own: Lengths, tokens: Lengths, characters: Lengths) -> LengthQuality:
    """How far the length of a response tells its side and its score. `own` are the tokens of the sampled examples.

    Within each side, scores are regressed on the logarithm of the tokens. The gap that this slope gives for the sides'
    mean lengths is `explained`, as a share of the whole gap.
    """
    logs = own.positives.clamp_min(1).log(), own.negatives.clamp_min(1).log()
    length = torch.cat([one - one.mean() for one in logs])
    score = torch.cat([one - one.mean() for one in (scores.positives, scores.negatives)])
    variance, covariance = float(length @ length), float(length @ score)
    norms = (variance * float(score @ score)) ** 0.5
    by_length = covariance / variance * float(logs[0].mean() - logs[1].mean()) if variance > 0 else 0.0
    return {
        "longer_tokens": tokens.preferred_longer,
        "longer_characters": characters.preferred_longer,
        "correlation": covariance / norms if norms > 0 else 0.0,
        "explained": min(max(0.0, by_length / scores.gap), 1.0) if scores.gap > 0 else 0.0,
    }


class _Sample:
    """The sampled vectors of one block, around the midpoint of both sides' means, and the numbers of training examples.

    Noise in the mean difference d adds to ‖d‖². What is left without it estimates ‖E d‖² without bias.
    """

    def __init__(self, statistics: LayerStatistics, counts: tuple[int, int]) -> None:
        self._paired, self._counts = statistics.paired, counts
        whole = statistics.difference if statistics.unweighted is None else statistics.unweighted
        self._direction = whole  # [hidden], of all training examples
        centre = (statistics.positive_mean + statistics.negative_mean) / 2
        given = statistics.positives, statistics.negatives
        self._positives, self._negatives = (spread_rows(side).double() - centre for side in given)
        self._rows = [spread_rows(torch.tensor(rows)) for rows in statistics.sampled]

    @property
    def rows(self) -> int:
        return len(self._positives) + (0 if self._paired else len(self._negatives))

    def own(self, lengths: Lengths) -> Lengths:
        """The lengths of the sampled examples."""
        return Lengths(lengths.positives[self._rows[0]], lengths.negatives[self._rows[1]], lengths.paired)

    def agreement(self) -> float:
        """The mean cosine between the differences of two pairs.

        Unpaired data has no pairs. There it is for the differences of random examples: the mean of their products over
        that of their squares.
        """
        if self._paired:
            units = torch.nn.functional.normalize(self._positives - self._negatives, dim=1)
            count = len(units)
            return float((units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1)))
        signal = self._signal()
        total = signal + _variance(self._positives) + _variance(self._negatives)
        return signal / total if total > 0 else 0.0

    def significance(self) -> float:
        """What exceeds chance in the agreement, in its standard deviations if no label meant anything.

        For pairs, labels are as good as random if each difference has a random sign: the products of two unit vectors
        then have mean 0, and are uncorrelated. For unpaired data it is the statistic of Chen and Qin (2010,
        doi:10.1214/09-AOS716) for equal means in many dimensions.
        """
        if self._paired:
            units = torch.nn.functional.normalize(self._positives - self._negatives, dim=1)
            products = (units @ units.T).fill_diagonal_(0)
            excess, variance = float(products.sum()), 2 * float(products.square().sum())
        else:
            sides = self._positives, self._negatives
            means = [side.mean(0) for side in sides]
            one, other = (side - mean for side, mean in zip(sides, means, strict=True))
            excess = float((means[0] - means[1]).square().sum())
            excess -= sum(_variance(side) / len(side) for side in sides)
            within = [float((side @ side.T).fill_diagonal_(0).square().sum()) / len(side) ** 4 for side in (one, other)]
            variance = 2 * sum(within) + 4 * float((one @ other.T).square().sum()) / (len(one) * len(other)) ** 2
        return excess / variance**0.5 if variance > 0 else 0.0

    def reproducibility(self) -> float:
        """The cosine to expect between the mean difference and that of as many other rows, at least 0."""
        square = float(self._direction.square().sum())
        return max(0.0, self._signal() / square) if square > 0 else 0.0

    def scores(self) -> Scores:
        """Each example's projection on the mean difference of all other rows."""
        half = self._direction / 2
        if self._paired:
            positive = negative = self._positives - self._negatives - self._direction
        else:
            positive, negative = self._positives - half, -half - self._negatives
        found = [
            (side * (self._direction - deviation / (count - 1))).sum(1)
            for side, deviation, count in zip(
                (self._positives, self._negatives), (positive, negative), self._counts, strict=True
            )
        ]
        return Scores(found[0], found[1])

    def _signal(self) -> float:
        if self._paired:
            noise = _variance(self._positives - self._negatives) / self._counts[0]
        else:
            noise = _variance(self._positives) / self._counts[0] + _variance(self._negatives) / self._counts[1]
        return float(self._direction.square().sum()) - noise


def spread_rows(values: torch.Tensor) -> torch.Tensor:
    """At most CHECK_ROWS evenly spaced rows."""
    return values[list(spread(range(len(values)), CHECK_ROWS))]


def _variance(vectors: torch.Tensor) -> float:
    """The variance of rows, summed over dimensions."""
    return float(vectors.var(0).sum())
