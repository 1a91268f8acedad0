"""RAHF (arXiv:2312.15997): tune a model to tell good from bad, then read the difference in its activations.

Owns both variants: what the first step trains, on what loss, and what the second reads. Knows nothing of optimisers, of
checkpoints or of alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from steering_vectors.contrast import Twin, mean_differences, pad_id, readings
from steering_vectors.likelihoods import response_log_likelihoods
from steering_vectors.methods.registry import Directions, Method, Task
from steering_vectors.methods.tuning import TuningOptions, both_sides, mean_log_likelihoods, tune, tuned_weights
from steering_vectors.weights import TunedWeights


@dataclass(frozen=True, slots=True)
class ScitOptions(TuningOptions):
    """`smoothing` is ε of the contrastive term."""

    smoothing: float = 0.2


@dataclass(frozen=True, slots=True)
class DualOptions(TuningOptions):
    """The paper has three epochs."""

    paper_epochs: ClassVar[float] = 3.0


def scit_difference(task: Task) -> Directions:
    """d = mean over responses r, and their tokens t, of h_t(p⁺, q, r) − h_t(p⁻, q, r), in the tuned model

    First step (single contrastive instruction tuning): each preferred response belongs to p⁺ and each rejected one to
    p⁻; with P = exp(mean token log-probability of r) and s = P_match / (P_match + P_mismatch),

        L = −log P_match + (1−ε)(−log s) + ε(−log(1−s)),   ε = 0.2

    Paper: RAHF-SCIT (arXiv:2312.15997, §3), with the token shift and the response mask that its code lacks.
    """
    options = task.read_options(ScitOptions)
    good, bad = both_sides(task, options)
    samples = [(twin, 1.0) for twin in good] + [(twin, -1.0) for twin in bad]

    def loss(batch: Sequence[tuple[Twin, float]]) -> torch.Tensor:
        labels = torch.tensor([label for _, label in batch], device=task.lm.device)
        positive, negative = mean_log_likelihoods(task.lm, [twin for twin, _ in batch])
        return contrastive_loss(positive, negative, labels, options.smoothing)

    with tuned_weights(task.lm, options, ["scit"], task.seed) as weights:
        tune(task, weights, "scit", options, samples, loss, (good, bad))
        return _read(task, [*good, *bad], options.responses, weights, ("scit", "scit"))


def dual_difference(task: Task) -> Directions:
    """d = mean over responses r, and their tokens t, of h_t^good(p⁺, q, r) − h_t^bad(p⁺, q, r)

    First step: two models from one base, each supervised on one side of the data under p⁺ (L = −mean log-probability of
    a response's tokens). The second reads the same text with either's weights.

    Paper: RAHF-Dual (arXiv:2312.15997, §3).
    """
    options = task.read_options(DualOptions)
    good, bad = ([replace(twin, negative=twin.positive) for twin in side] for side in both_sides(task, options))

    def loss(batch: Sequence[Twin]) -> torch.Tensor:
        reading, _ = readings(batch, pad_id(task.lm), task.lm.device)
        sums, counts = response_log_likelihoods(task.lm, reading)
        return -(sums / counts).mean()

    with tuned_weights(task.lm, options, ["good", "bad"], task.seed) as weights:
        for name, side in (("good", good), ("bad", bad)):
            tune(task, weights, name, options, side, loss, (side,))
        return _read(task, [*good, *bad], options.responses, weights, ("good", "bad"))


def contrastive_loss(
    positive: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """SCIT's loss from the responses' mean token log-probabilities under p⁺ and p⁻, `[rows]`; labels are ±1."""
    match, mismatch = torch.where(labels > 0, positive, negative), torch.where(labels > 0, negative, positive)
    odds = match - mismatch  # log s − log(1 − s)
    contrast = -(1 - smoothing) * logsigmoid(odds) - smoothing * logsigmoid(-odds)
    return (contrast - match).mean()


def _read(task: Task, twins: Sequence[Twin], most: int, weights: TunedWeights, names: tuple[str, str]) -> Directions:
    """The second step: mean differences between two readings, with the weights of either name."""
    thinned = twins[:: -(-len(twins) // most)]
    found = mean_differences(
        task.lm,
        thinned,
        task.layers,
        tokens=task.tokens,
        weights=lambda side: weights.use(names[side]),
        progress=task.progress,
    )
    return {layer: direction.to(torch.float32) for layer, direction in found.items()}


SCIT = Method("rahf-scit", scit_difference, options=ScitOptions)
DUAL = Method("rahf-dual", dual_difference, options=DualOptions)
