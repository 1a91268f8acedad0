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
        values, ids = logits.topk(most, dim=-1)
        columns += [values - normaliser, ids]
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()  # all by one copy from the device
    return [
        TokenLogprob(token_id, row[0], _likeliest(row[1:])[:top])
        for token_id, row, top in zip(token_ids, rows, tops, strict=True)
    ]


def divergence(steered: Tensor, base: Tensor) -> float:
    """KL(steered‖base) in nats of two rows of logits `[vocabulary]`; a token barred under both costs nothing."""
    log_probs = (logits.float().log_softmax(-1) for logits in (steered, base))
    return max(float(kl_divergence(*log_probs)), 0.0)


def _likeliest(found: list[float]) -> tuple[tuple[int, float], ...]:
    """Ids with log-probabilities, of which the list has all, then all the ids."""
    logprobs, ids = found[: len(found) // 2], map(int, found[len(found) // 2 :])
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0])))
