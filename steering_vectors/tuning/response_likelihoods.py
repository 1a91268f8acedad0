"""Log-likelihoods of responses, with gradients, for methods that train.

Only the positions that predict a response go through the output projection, some at a time, so no tensor of all
positions and the vocabulary exists, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steering_vectors.models.forward import output_projection, projected_logits
from steering_vectors.models.hooks import intercepting, raw_outputs
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Around, Reading, forward, no_context

MAX_LOGITS = 2**23  # numbers at a time

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def response_log_likelihoods(
    lm: LanguageModel, reading: Reading, around: Around = no_context
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log P(response | prompt) in nats, number of tokens), float32 `[rows]` each. `around` gives the context of each
    forward pass.

    Every prompt must have at least one token, which predicts the first token of the response. Raises ModelError if the
    model has no output projection.
    """
    projection = output_projection(lm)
    counted, columns = reading.response, reading.response.shape[1] + 1
    with intercepting(projection) as taken:
        outputs = raw_outputs(lm.blocks, lambda: forward(lm, reading, around, keep=columns))
    hidden = taken[-1][:, -columns:-1][counted]  # [tokens, hidden]
    targets = reading.ids[:, reading.start :][counted]

    def score(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = projected_logits(lm, hidden, outputs).float()
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    chosen = _chosen(score, hidden, targets, max(1, MAX_LOGITS // lm.vocab_size), projection)
    rows = counted.nonzero()[:, 0]
    return torch.zeros(len(counted), device=chosen.device).index_add(0, rows, chosen), counted.sum(1).float()


def _chosen(
    score: Score, hidden: torch.Tensor, targets: torch.Tensor, size: int, projection: nn.Module
) -> torch.Tensor:
    """The scores of all positions, `size` of them at a time: float32 `[tokens]`."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in projection.parameters()):
        parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])
    scores: torch.Tensor = _Scores.apply(hidden, targets, score, size)  # type: ignore[no-untyped-call]
    return scores


class _Scores(torch.autograd.Function):
    """Scores that do not depend on each other. The forward pass computes their gradients too, which are as small as
    the hidden states, while it has the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, score: Score, size: int) -> torch.Tensor:
        scores, gradients, needed = [], [], ctx.needs_input_grad[0]
        for part, wanted in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            with torch.set_grad_enabled(needed):
                leaf = part.detach().requires_grad_(needed)
                found = score(leaf, wanted)
            if needed:
                gradients.append(torch.autograd.grad(found, leaf, torch.ones_like(found))[0])
            scores.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return (upstream[0].unsqueeze(-1) * gradients).to(gradients), None, None, None
