"""Likelihoods of preferred and rejected responses, and how well a direction separates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from steering_vectors.data.corpus import Sides
from steering_vectors.measures.activations import LayerStatistics, Tokens, pooled
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import PropensityReport
from steering_vectors.profiles.profile import Profile

STRENGTHS = (-1.0, 0.0, 1.0)
REPORT_ROWS = 256  # examples per side for the reported margins
KEPT_ROWS = 128  # examples whose unsteered pass is kept at a time


@dataclass(frozen=True, slots=True, eq=False)
class Propensity:
    """One score per example, in nats: log P(response | prompt). For unpaired data it is divided by the number of
    tokens, because the two sides answer different prompts and differ in length."""

    positives: torch.Tensor  # [positives] float64
    negatives: torch.Tensor  # [negatives] float64
    paired: bool

    @property
    def margin(self) -> float:
        """Mean of log P(chosen) − log P(rejected) over pairs; for unpaired data, the difference of the sides' means."""
        return float(self.positives.mean() - self.negatives.mean())

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is more likely; for unpaired data, of all pairs across the sides."""
        if self.paired:
            return float((self.positives > self.negatives).double().mean())
        return float((self.positives.unsqueeze(1) > self.negatives).double().mean())


def token_log_odds(
    sides: Sides, vocab_size: int, weights: tuple[Sequence[float], Sequence[float]] | None = None
) -> torch.Tensor:
    """Log-odds of each token between preferred and rejected responses, float32 `[vocabulary]`.

    Each count is smoothed by 2, shared between the sides by their size, so an unseen token has log-odds 0. Values are
    clipped to ±2. `weights` says how much each example of either side counts, relative to their mean.
    """
    counts = []
    for side, examples in enumerate((sides.positives, sides.negatives)):
        tokens = torch.tensor([token for ids, start in examples for token in ids[start:]])
        if weights is None:
            counts.append(torch.bincount(tokens, minlength=vocab_size).double())
            continue
        own = torch.tensor(weights[side], dtype=torch.float64)
        lengths = torch.tensor([len(ids) - start for ids, start in examples])
        counts.append(torch.bincount(tokens, (own / own.mean()).repeat_interleave(lengths), minlength=vocab_size))
    total = counts[0].sum() + counts[1].sum()
    logs = [((one + 2 * one.sum() / total) / one.sum()).log() for one in counts]
    return (logs[0] - logs[1]).clamp(-2, 2).float()


def propensity(steered: SteeredModel, sides: Sides, *, steer: bool) -> Propensity:
    """Scores of the examples under the current steering, or without it (`steer=False`)."""
    sums, counts = steered.log_likelihoods([*sides.positives, *sides.negatives], steer=steer)
    scores = sums if sides.paired else sums / counts.clamp_min(1)
    return Propensity(scores[: len(sides.positives)], scores[len(sides.positives) :], sides.paired)


def propensity_report(steered: SteeredModel, profile: Profile, sides: Sides) -> PropensityReport:
    """Margin and accuracy at strengths −1, 0 and +1; for pairs also the share whose margin decreases from −1 to +1."""
    seen = _propensities(steered, profile, sides)
    report: PropensityReport = {
        "unit": "nats per response" if sides.paired else "nats per token",
        "rows": len(sides.positives) if sides.paired else len(sides.positives) + len(sides.negatives),
        "strengths": [
            {"strength": strength, "margin": one.margin, "accuracy": one.accuracy} for strength, one in seen.items()
        ],
    }
    if sides.paired:
        low, high = seen[-1.0], seen[1.0]
        moved = (high.positives - high.negatives) - (low.positives - low.negatives)
        report["anti_steerable"] = float((moved < 0).double().mean())
    return report


def _propensities(steered: SteeredModel, profile: Profile, sides: Sides) -> dict[float, Propensity]:
    """The propensity at each strength. The blocks below the first steered one are computed once for all strengths."""
    count, examples = len(sides.positives), [*sides.positives, *sides.negatives]
    # both responses to a prompt are in one part, which computes the prompt once
    order = sorted(range(len(examples)), key=lambda index: (index % count if sides.paired else index, index))
    scores = {strength: torch.zeros(len(examples), dtype=torch.float64) for strength in STRENGTHS}
    for first in range(0, len(order), KEPT_ROWS):
        part = order[first : first + KEPT_ROWS]
        kept = steered.kept([examples[index] for index in part], profile.layers[:1])
        for strength in STRENGTHS:
            steered.write(profile, strength)
            sums, counts = kept.log_likelihoods(profile.layers[0], steer=strength != 0)
            scores[strength][part] = sums if sides.paired else sums / counts.clamp_min(1)
    return {strength: Propensity(one[:count], one[count:], sides.paired) for strength, one in scores.items()}


def projection_accuracies(
    lm: LanguageModel,
    statistics: Mapping[int, LayerStatistics],
    directions: Mapping[int, torch.Tensor],
    sides: Sides,
    *,
    tokens: Tokens,
    batch_tokens: int,
) -> dict[str, float]:
    """The accuracy of the projection h·d on held-out examples, per block, averaged over both sides.

    The threshold is midway between the means of the training sides.
    """
    layers = sorted(directions)
    stack = torch.stack([directions[layer].double() for layer in layers])  # [layers, hidden]
    middle = torch.stack([(statistics[k].positive_mean + statistics[k].negative_mean) / 2 for k in layers])
    examples = [*sides.positives, *sides.negatives]
    above = torch.zeros(len(examples), len(layers), dtype=torch.float64)
    for part in pooled(lm, examples, layers, tokens=tokens, batch_tokens=batch_tokens):
        above[list(part.indices)] = (((part.vectors.cpu() - middle) * stack).sum(-1) > 0).double()
    hits, misses = above[: len(sides.positives)].mean(0), above[len(sides.positives) :].mean(0)
    return {str(layer): float((hits[k] + 1 - misses[k]) / 2) for k, layer in enumerate(layers)}
