"""Log-likelihoods of responses, with gradients, for methods that train."""

from __future__ import annotations

import torch

from steering_vectors.models.forward import takes
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Reading, forward_arguments


def response_log_likelihoods(lm: LanguageModel, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """(log P(response | prompt) in nats, number of tokens), float32 `[rows]` each.

    Every prompt must have at least one token, which predicts the first token of the response.
    """
    columns = reading.ids.shape[1] - reading.start + 1
    options = {"logits_to_keep": columns} if takes(lm.model, "logits_to_keep") else {}
    logits = lm.model(**forward_arguments(lm, reading), **options, use_cache=False).logits[:, -columns:-1]
    targets = reading.ids[:, reading.start :]
    chosen = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    counted = reading.response
    return (chosen * counted).sum(1), counted.sum(1).float()
