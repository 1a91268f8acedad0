"""The normal of a linear probe."""

from __future__ import annotations

import warnings

import torch

from steering_vectors.measures.activations import LayerStatistics
from steering_vectors.methods.registry import per_layer

REGULARISATION = 1.0  # scikit-learn's C, on activations scaled to a mean variance of 1
MAX_ITERATIONS = 1000


def probe_normal(statistics: LayerStatistics) -> torch.Tensor:
    """w = argmin Σ_i log(1 + exp(−y_i (w·x_i + b))) + ‖w‖²/2C,  u = w/‖w‖;   d = |u·Δ| u,  Δ = mean(h⁺) − mean(h⁻)

    The normal of the plane that best separates the two sides. It discounts variation within a side, so it need not
    point from the rejected to the preferred mean. Activations are centred and divided by one number, so that C means
    the same at every block and w keeps its direction. The length is that of Δ along u. Weights of rows are factors of
    the terms of the sum.

    Paper: Inference-Time Intervention (arXiv:2306.03341), which probes attention heads.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = torch.cat([statistics.positives, statistics.negatives]).double()
    labels = [1] * len(statistics.positives) + [0] * len(statistics.negatives)
    centred = rows - rows.mean(0)
    scale = centred.square().mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
    probe = LogisticRegression(C=REGULARISATION, tol=1e-6, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly there still has a normal
        probe.fit((centred / scale).numpy(), labels, sample_weight=torch.cat(statistics.weights()).numpy())
    normal = torch.from_numpy(probe.coef_[0].copy())
    unit = normal / normal.norm().clamp_min(torch.finfo(rows.dtype).tiny)
    direction: torch.Tensor = (unit @ statistics.difference).abs() * unit
    return direction


METHOD = per_layer(
    "probe",
    probe_normal,
    needs_sample=True,
    direction="normal of a logistic regression, with the length of the mean difference along it",
    paper="Inference-Time Intervention (arXiv:2306.03341)",
)
