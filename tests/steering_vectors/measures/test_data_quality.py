"""Figures of preference data on vectors whose answer is known, and what they do not depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steering_vectors.measures.activations import LayerStatistics
from steering_vectors.measures.data_quality import Lengths, quality_at
from steering_vectors.profiles.metadata import DataQuality

HIDDEN = 24
SEEDS = range(6)


def statistics_of(positives: torch.Tensor, negatives: torch.Tensor, *, paired: bool = True) -> LayerStatistics:
    """The statistics of these vectors, all of them sampled."""
    means = positives.double().mean(0), negatives.double().mean(0)
    rows = tuple(range(len(positives))), tuple(range(len(negatives)))
    return LayerStatistics(*means, positives.float(), negatives.float(), 1.0, paired, rows)


def lengths_of(positives: torch.Tensor, negatives: torch.Tensor, *, paired: bool = True) -> Lengths:
    return Lengths(positives.double(), negatives.double(), paired)


def equal_lengths(statistics: LayerStatistics) -> Lengths:
    ones = [torch.full((len(side),), 10) for side in (statistics.positives, statistics.negatives)]
    return lengths_of(*ones, paired=statistics.paired)


def quality(statistics: LayerStatistics, tokens: Lengths | None = None) -> DataQuality:
    tokens = tokens or equal_lengths(statistics)
    return quality_at(1, statistics, tokens, tokens)


def planted(
    seed: int, *, rows: int = 300, noise: float = 0.3, flipped: float = 0.0, gap: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that share a topic and differ by `gap` along one axis; `flipped` of them have their sides swapped."""
    draw = torch.Generator().manual_seed(seed)
    topic = 2 * torch.randn(rows, HIDDEN, generator=draw)
    axis = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=draw), dim=0)
    sides = [topic + sign * gap / 2 * axis + noise * torch.randn(rows, HIDDEN, generator=draw) for sign in (1.0, -1.0)]
    swap = (torch.arange(rows) < round(flipped * rows)).unsqueeze(1)
    return torch.where(swap, sides[1], sides[0]), torch.where(swap, sides[0], sides[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_differences_agree_fully(seed: int) -> None:
    found = quality(statistics_of(*planted(seed, noise=0.0)))
    assert found["agreement"] == pytest.approx(1.0, abs=1e-6)
    assert found["reproducibility"] == pytest.approx(1.0, abs=1e-6)
    assert quality(statistics_of(*planted(seed, noise=0.01)))["agreement"] > 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_labels_leave_nothing(seed: int) -> None:
    """Half of the pairs are swapped: the mean of every figure is 0, and a sample stays close to it."""
    found = quality(statistics_of(*planted(seed, flipped=0.5)))
    assert abs(found["agreement"]) < 0.02
    assert found["reproducibility"] < 0.75
    assert abs(found["separation"]) < 0.35
    assert abs(found["significance"]) < 4


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("figure", ["agreement", "separation"])
def test_pure_noise_has_no_bias(paired: bool, figure: str) -> None:
    """Agreement and separation come from the same rows as the direction, and yet average to 0 without a preference."""
    values = []
    for seed in range(200):
        positives, negatives = planted(seed, rows=20, gap=0.0)
        if not paired:  # independent sides
            negatives = planted(seed + 1000, rows=20, gap=0.0)[1]
        found = quality(statistics_of(positives, negatives, paired=paired))
        values.append(found[figure])  # type: ignore[literal-required]
    mean, error = float(np.mean(values)), float(np.std(values)) / len(values) ** 0.5
    assert abs(mean) < 3.5 * error
    assert error < 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_the_significance_of_noise_is_a_standard_score(paired: bool) -> None:
    values = []
    for seed in range(300):
        positives, negatives = planted(seed, rows=30, gap=0.0)
        if not paired:
            negatives = planted(seed + 1000, rows=30, gap=0.0)[1]
        values.append(quality(statistics_of(positives, negatives, paired=paired))["significance"])
    assert abs(np.mean(values)) < 0.2
    assert np.std(values) == pytest.approx(1.0, abs=0.15)


def test_significance_grows_with_rows_and_agreement() -> None:
    few, many = (quality(statistics_of(*planted(1, rows=rows, noise=0.5)))["significance"] for rows in (40, 400))
    assert 5 < 3 * few < many
    assert quality(statistics_of(*planted(1, rows=400, noise=0.5, flipped=0.3)))["significance"] < many / 2


@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.3])
def test_swapping_pairs_scales_agreement(flipped: float) -> None:
    """Cosines change sign between a swapped and a kept pair, so agreement is multiplied by (1 − 2·share)²."""
    whole = quality(statistics_of(*planted(0)))["agreement"]
    found = quality(statistics_of(*planted(0, flipped=flipped)))["agreement"]
    assert found == pytest.approx((1 - 2 * flipped) ** 2 * whole, abs=0.01)


def test_agreement_equals_the_mean_over_all_pairs_of_differences() -> None:
    positives, negatives = planted(3, rows=17)
    differences = (positives.float() - negatives.float()).double()
    cosines = torch.nn.functional.cosine_similarity(differences.unsqueeze(0), differences.unsqueeze(1), dim=-1)
    expected = float((cosines.sum() - 17) / (17 * 16))
    assert quality(statistics_of(positives, negatives))["agreement"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("paired", [True, False])
def test_scores_are_projections_on_the_mean_difference_of_other_rows(paired: bool) -> None:
    positives, negatives = (side.double() for side in planted(4, rows=12))
    scores: list[list[torch.Tensor]] = [[], []]
    for row in range(12):
        others = torch.arange(12) != row
        for side, vectors in enumerate((positives, negatives)):
            plus = positives[others] if paired or side == 0 else positives
            minus = negatives[others] if paired or side == 1 else negatives
            centre = (positives.mean(0) + negatives.mean(0)) / 2
            scores[side].append((vectors[row] - centre) @ (plus.mean(0) - minus.mean(0)))
    plus, minus = torch.stack(scores[0]), torch.stack(scores[1])
    expected = float((plus.mean() - minus.mean()) / ((plus.var() + minus.var()) / 2).sqrt())
    found = quality(statistics_of(positives, negatives, paired=paired))["separation"]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_reproducibility_predicts_the_cosine_of_two_fits(paired: bool) -> None:
    """Directions from two draws of 40 rows: their cosine, averaged over 60 draws, and the mean prediction."""

    def draw(seed: int) -> LayerStatistics:
        generator = torch.Generator().manual_seed(seed)
        axis = torch.zeros(HIDDEN)
        axis[0] = 1.0
        sides = [torch.randn(40, HIDDEN, generator=generator) + sign * 0.4 * axis for sign in (1.0, -1.0)]
        return statistics_of(*sides, paired=paired)

    drawn = [draw(seed) for seed in range(120)]
    directions = [one.difference for one in drawn]
    cosines = [
        float(torch.cosine_similarity(one, other, dim=0))
        for one, other in zip(directions[::2], directions[1::2], strict=True)
    ]
    predicted = sum(quality(one)["reproducibility"] for one in drawn) / len(drawn)
    assert predicted == pytest.approx(sum(cosines) / len(cosines), abs=0.05)
    assert 0.2 < predicted < 0.6


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_rows_and_the_names_of_sides_do_not_matter(paired: bool, seed: int) -> None:
    positives, negatives = planted(seed, rows=50, flipped=0.2)
    draw = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 60, (50,), generator=draw) for _ in range(2)]
    first = quality(statistics_of(positives, negatives, paired=paired), lengths_of(*tokens, paired=paired))
    order = torch.randperm(50, generator=draw)
    other = order if paired else torch.randperm(50, generator=draw)
    shuffled = quality(
        statistics_of(positives[order], negatives[other], paired=paired),
        lengths_of(tokens[0][order], tokens[1][other], paired=paired),
    )
    swapped = quality(
        statistics_of(negatives, positives, paired=paired), lengths_of(tokens[1], tokens[0], paired=paired)
    )
    for figure in ("agreement", "significance", "reproducibility", "separation"):
        assert shuffled[figure] == pytest.approx(first[figure], abs=1e-5)  # type: ignore[literal-required]
        assert swapped[figure] == pytest.approx(first[figure], abs=1e-5)  # type: ignore[literal-required]
    assert shuffled["length"] == pytest.approx(first["length"], abs=1e-5)
    assert swapped["length"]["longer_tokens"] == pytest.approx(1 - first["length"]["longer_tokens"])
    assert swapped["length"]["correlation"] == pytest.approx(-first["length"]["correlation"], abs=1e-5)
    assert swapped["length"]["explained"] == pytest.approx(first["length"]["explained"], abs=1e-5)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_confound_of_length_is_seen(paired: bool, seed: int) -> None:
    """Vectors hold the logarithm of the length and nothing else that tells the sides, or an axis apart from it."""
    draw = torch.Generator().manual_seed(seed)
    length, manner = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=draw)).Q.T
    tokens = [torch.randint(low, low + 60, (200,), generator=draw) for low in (60, 5)]
    alike = [torch.randint(10, 90, (200,), generator=draw) for _ in range(2)]

    def made(counts: list[torch.Tensor], gap: float) -> DataQuality:
        sides = [
            torch.outer(count.float().log(), length)
            + sign * gap / 2 * manner
            + 0.1 * torch.randn(200, HIDDEN, generator=draw)
            for count, sign in zip(counts, (1.0, -1.0), strict=True)
        ]
        return quality(statistics_of(*sides, paired=paired), lengths_of(*counts, paired=paired))

    confounded, free = made(tokens, 0.0), made(alike, 2.0)
    assert confounded["length"]["longer_tokens"] > 0.9
    assert confounded["length"]["explained"] > 0.9
    assert confounded["length"]["correlation"] > 0.9
    assert abs(free["length"]["longer_tokens"] - 0.5) < 0.15
    assert free["length"]["explained"] < 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_share_of_longer_responses_equals_counting(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(1, 9, (size,), generator=draw) for size in (30, 30 if seed % 2 else 17))
    counted = [float((a > b).double() + 0.5 * (a == b).double()) for a in one for b in other]
    assert lengths_of(one, other, paired=False).preferred_longer == pytest.approx(sum(counted) / len(counted))
    if len(one) == len(other):
        counted = [float((a > b).double() + 0.5 * (a == b).double()) for a, b in zip(one, other, strict=True)]
        assert lengths_of(one, other).preferred_longer == pytest.approx(sum(counted) / len(counted))


def test_rows_beyond_the_sample_count() -> None:
    """A sample of 100 of 400 rows gives nearly the reproducibility of all, and more than that of 100 rows alone."""
    positives, negatives = planted(5, rows=400, noise=1.5)
    whole = statistics_of(positives, negatives)
    rows = tuple(range(0, 400, 4))
    part = replace(whole, positives=positives[::4], negatives=negatives[::4], sampled=(rows, rows))
    expected = quality(whole)["reproducibility"]
    assert quality(part, equal_lengths(whole))["reproducibility"] == pytest.approx(expected, abs=0.02)
    assert quality(statistics_of(positives[::4], negatives[::4]))["reproducibility"] < expected - 0.05
    assert quality(part, equal_lengths(whole))["rows"] == 100


def test_equal_sides_give_no_figure_that_is_not_finite() -> None:
    positives, _ = planted(0, rows=20)
    for paired in (True, False):
        found = quality(statistics_of(positives, positives, paired=paired))
        assert found["reproducibility"] == found["separation"] == 0.0 or not paired
        assert found["length"]["explained"] == 0.0
        assert abs(found["agreement"]) < 0.2
