"""The principal component of pair differences."""

from __future__ import annotations

import torch

from steering_vectors.measures.activations import LayerStatistics
from steering_vectors.methods.registry import per_layer


def principal_difference(statistics: LayerStatistics) -> torch.Tensor:
    """u = argmax over ‖u‖ = 1 of Σ_i (u·δ_i)²,  δ_i = h⁺_i − h⁻_i;   d = (u·Δ) u,  Δ = mean(h⁺) − mean(h⁻)

    The axis along which the two sides of a pair differ most. The differences are *not* centred, because centring would
    delete their mean, which is the direction sought. The factor u·Δ gives the axis the sign of the labels and a length
    on the scale of the difference of means.

    Unpaired data: δ runs over all pairs of a positive with a negative example. Their second moment is
    Cov(h⁺) + Cov(h⁻) + ΔΔᵀ, so no pairing is drawn. Weights of rows are factors of the terms of the sum, and of the
    covariances.

    Paper: Representation Engineering (arXiv:2310.01405).
    """
    unit = first_component(_differences(statistics) if statistics.paired else _cross_differences(statistics))
    direction: torch.Tensor = (unit @ statistics.difference) * unit
    return direction


def first_component(rows: torch.Tensor) -> torch.Tensor:
    """The unit vector `[hidden]` that maximises Σ (u·row)², for float64 rows `[n, hidden]`; its sign is arbitrary."""
    count, hidden = rows.shape
    gram = rows.T @ rows if count >= hidden else rows @ rows.T  # the smaller one has the same component
    component: torch.Tensor = torch.linalg.eigh(gram).eigenvectors[:, -1]
    if count < hidden:
        component = component @ rows
    component /= component.norm().clamp_min(torch.finfo(rows.dtype).tiny)
    return component


def _differences(statistics: LayerStatistics) -> torch.Tensor:
    weights, _ = statistics.weights()
    return (statistics.positives.double() - statistics.negatives.double()) * weights.sqrt().unsqueeze(1)


def _cross_differences(statistics: LayerStatistics) -> torch.Tensor:
    """Rows whose second moment is that of all cross differences: both sides centred, and the difference of means."""
    rows, means = [], []
    for side, weights in zip((statistics.positives, statistics.negatives), statistics.weights(), strict=True):
        shares = (weights / weights.sum()).unsqueeze(1)  # [sample, 1]
        means.append((shares * side.double()).sum(0))
        rows.append((side.double() - means[-1]) * shares.sqrt())
    return torch.cat([*rows, (means[0] - means[1]).unsqueeze(0)])


METHOD = per_layer(
    "pca",
    principal_difference,
    needs_sample=True,
    direction="first principal component of the pair differences, with the sign and length of the mean difference",
    paper="Representation Engineering (arXiv:2310.01405)",
)
