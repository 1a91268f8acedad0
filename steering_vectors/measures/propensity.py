"""How much more likely a model finds preferred responses than rejected ones, and how that moves with strength.

Owns the measures on held-out examples that fitting stores and layers are chosen by. Knows nothing of how directions
were found, nor of texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.sides import Sides
from steering_vectors.measures.activations import LayerStatistics, Tokens, pooled
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import PropensityReport
from steering_vectors.profiles.profile import Profile

STRENGTHS = (-1.0, 0.0, 1.0)
REPORT_ROWS = 256  # examples a side that margins are reported on


@dataclass(frozen=True, slots=True, eq=False)
class Propensity:
    """One score per example, in nats: log P(response | prompt); for unpaired data divided by its number of tokens,
    since its two sides answer different prompts and differ in length."""

    positives: torch.Tensor  # [positives] float64
    negatives: torch.Tensor  # [negatives] float64
    paired: bool

    @property
    def margin(self) -> float:
        """Mean of log P(chosen) − log P(rejected) over pairs; unpaired: difference of the sides' means."""
        return float(self.positives.mean() - self.negatives.mean())

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is the likelier; unpaired: of all pairs of a positive and a negative."""
        if self.paired:
            return float((self.positives > self.negatives).double().mean())
        return float((self.positives.unsqueeze(1) > self.negatives).double().mean())


def token_log_odds(sides: Sides, vocab_size: int) -> torch.Tensor:
    """How much likelier each token is in preferred than in rejected responses: log-odds, float32 `[vocabulary]`.

    Two tokens' worth of the sides' own sizes are added to every count, so a token never seen has 0; cut at ±2.
    """
    counts = [_token_counts(examples, vocab_size) for examples in (sides.positives, sides.negatives)]
    total = counts[0].sum() + counts[1].sum()
    logs = [((one + 2 * one.sum() / total) / one.sum()).log() for one in counts]
    return (logs[0] - logs[1]).clamp(-2, 2).float()


def propensity(steered: SteeredModel, sides: Sides, *, steer: bool) -> Propensity:
    """Scores of the examples under the mix that is written, or (`steer=False`) under the model itself."""
    sums, counts = steered.log_likelihoods([*sides.positives, *sides.negatives], steer=steer)
    scores = sums if sides.paired else sums / counts.clamp_min(1)
    return Propensity(scores[: len(sides.positives)], scores[len(sides.positives) :], sides.paired)


def propensity_report(steered: SteeredModel, profile: Profile, sides: Sides) -> PropensityReport:
    """Margin and accuracy at strengths −1, 0 and +1; for pairs also the share whose margin falls from −1 to +1."""
    seen: dict[float, Propensity] = {}
    for strength in STRENGTHS:
        steered.write(profile, strength)
        seen[strength] = propensity(steered, sides, steer=strength != 0)
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


def projection_accuracies(
    lm: LanguageModel,
    statistics: Mapping[int, LayerStatistics],
    directions: Mapping[int, torch.Tensor],
    sides: Sides,
    *,
    tokens: Tokens,
    batch_tokens: int,
) -> dict[int, float]:
    """Per block, how well the projection h·d tells held-out examples apart: the mean of both sides' accuracies.

    The threshold lies midway between the training sides' means.
    """
    layers = sorted(directions)
    stack = torch.stack([directions[layer].double() for layer in layers])  # [layers, hidden]
    middle = torch.stack([(statistics[k].positive_mean + statistics[k].negative_mean) / 2 for k in layers])
    examples = [*sides.positives, *sides.negatives]
    above = torch.zeros(len(examples), len(layers), dtype=torch.float64)
    for part in pooled(lm, examples, layers, tokens=tokens, batch_tokens=batch_tokens):
        above[list(part.indices)] = (((part.vectors.cpu() - middle) * stack).sum(-1) > 0).double()
    hits, misses = above[: len(sides.positives)].mean(0), above[len(sides.positives) :].mean(0)
    return {layer: float((hits[k] + 1 - misses[k]) / 2) for k, layer in enumerate(layers)}


def _token_counts(examples: Sequence[Encoded], vocab_size: int) -> torch.Tensor:
    tokens = torch.tensor([token for ids, start in examples for token in ids[start:]])
    return torch.bincount(tokens, minlength=vocab_size).double()
