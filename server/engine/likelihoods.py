"""How likely a token was, and which were the likeliest: what `logprobs`, `echo` and scoring tell.

Owns the arithmetic on logits as the model, steered as it was, computed them: before penalties, bias and temperature.
Knows nothing of requests, of text or of how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.protocol import TokenLogprob
from steering_vectors.steered import kl_divergence


def token_logprobs(logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """One for each row of `logits` `[rows, vocabulary]`, in nats, computed in float32.

    `tops` says how many of the likeliest tokens each row lists, in descending order, the lowest id first among equals.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(dim=-1)
    targets = torch.tensor(list(token_ids), device=logits.device).unsqueeze(1)
    chosen = (logits.gather(1, targets).squeeze(1) - normaliser).tolist()
    likeliest = _likeliest(logits, normaliser, max(tops, default=0))
    return [
        TokenLogprob(token_id, logprob, tuple(row[:top]))
        for token_id, logprob, row, top in zip(token_ids, chosen, likeliest, tops, strict=True)
    ]


def divergence(steered: Tensor, base: Tensor) -> float:
    """KL(steered‖base) in nats of two rows of logits `[vocabulary]`; a token barred under both costs nothing."""
    log_probs = (logits.float().log_softmax(-1) for logits in (steered, base))
    return max(float(kl_divergence(*log_probs)), 0.0)


def _likeliest(logits: Tensor, normaliser: Tensor, most: int) -> list[list[tuple[int, float]]]:
    if not most:
        return [[] for _ in range(len(logits))]
    values, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    logprobs = values - normaliser.unsqueeze(1)
    rows = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [sorted(zip(*row, strict=True), key=lambda pair: (-pair[1], pair[0])) for row in rows]
