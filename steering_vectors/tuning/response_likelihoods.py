"""Log-probabilities of responses that gradients flow through: what methods that train are made of.

Owns which logits belong to which token of a response. Knows nothing of losses, optimisers or methods.
"""

from __future__ import annotations

import torch

from steering_vectors.models.forward import takes
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Reading, forward_arguments


def response_log_likelihoods(lm: LanguageModel, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """(log P(response | prompt) in nats, number of tokens), `[rows]` each, float32.

    Prompts must have a token: a response's first one is predicted from the column before it.
    """
    columns = reading.ids.shape[1] - reading.start + 1
    options = {"logits_to_keep": columns} if takes(lm.model, "logits_to_keep") else {}
    logits = lm.model(**forward_arguments(lm, reading), **options, use_cache=False).logits[:, -columns:-1]
    targets = reading.ids[:, reading.start :]
    chosen = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    counted = reading.response
    return (chosen * counted).sum(1), counted.sum(1).float()
