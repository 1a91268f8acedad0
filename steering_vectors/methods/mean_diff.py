"""The difference of means."""

from __future__ import annotations

import torch

from steering_vectors.measures.activations import LayerStatistics
from steering_vectors.methods.registry import per_layer


def mean_difference(statistics: LayerStatistics) -> torch.Tensor:
    """d = mean(h⁺) − mean(h⁻)

    Adding d moves the mean rejected activation onto the mean preferred one. What both sides have in common cancels,
    also for unpaired data. Rows with weights count in the means by their weight.

    Paper: Contrastive Activation Addition (arXiv:2312.06681), which reads the answer's token. Over the mean of the
    response's tokens it is RAHF's difference (arXiv:2312.15997) without the first step.
    """
    return statistics.difference


METHOD = per_layer(
    "mean-diff",
    mean_difference,
    needs_sample=False,
    direction="mean h(q, r⁺) − mean h(q, r⁻)",
    paper="Contrastive Activation Addition (arXiv:2312.06681)",
)
