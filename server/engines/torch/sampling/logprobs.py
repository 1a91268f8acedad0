"""Log-probabilities of tokens and the likeliest alternatives, from the logits of the steered model, before penalties,
bias and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engines.protocol import TokenLogprob
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.models.transfers import tensor_on


def token_logprobs(logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """One for each row of `logits` `[rows, vocabulary]`, in nats, computed in float32.

    `tops` says how many of the likeliest tokens each row lists, in descending order, the lowest id first among equals.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    targets = tensor_on(list(token_ids), logits.device).unsqueeze(1)
    columns = [logits.gather(1, targets) - normaliser]
    if most := min(max(tops, default=0), logits.shape[1]):
        values, ids = _likeliest(logits, most)
        columns += [values - normaliser, ids]
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()  # all by one copy from the device
    return [
        TokenLogprob(token_id, row[0], tuple(zip(map(int, row[1 + most :]), row[1 : 1 + most], strict=True))[:top])
        for token_id, row, top in zip(token_ids, rows, tops, strict=True)
    ]


def divergence(steered: Tensor, base: Tensor) -> float:
    """KL(steered‖base) in nats of two rows of logits `[vocabulary]`; a token barred under both costs nothing."""
    log_probs = (logits.float().log_softmax(-1) for logits in (steered, base))
    return max(float(kl_divergence(*log_probs)), 0.0)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest logits of each row and their ids, descending, the lowest id first among equals."""
    values, ids = logits.topk(count)  # of equal logits at the border it takes any
    border = values[:, -1:]
    tied, listed = logits == border, values == border
    if bool((tied.sum(1) > listed.sum(1)).any()):
        backwards = torch.arange(logits.shape[1], 0, -1, device=logits.device)
        lowest = (tied * backwards.int()).topk(count).indices  # of the tied ids, ascending
        ids = torch.where(listed, lowest.gather(1, (listed.cumsum(1) - 1).clamp_(min=0)), ids)
    ids, order = ids.sort()
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return values, ids.gather(1, order)
