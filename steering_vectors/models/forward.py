"""What a model's forward takes and returns: its arguments, the name of its state, its logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.models.hooks import giving, resumed

if TYPE_CHECKING:
    from steering_vectors.models.loading import LanguageModel

STATE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""What architectures call their state of earlier positions."""


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def state_argument(model: nn.Module) -> str | None:
    """The name of the model's state of earlier positions, or None if its forward takes no state."""
    return next((name for name in STATE_ARGUMENTS if takes(model, name)), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, which has no dropout, until the context ends."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def last_logits(output: Any, count: int = 1) -> torch.Tensor:
    """Logits of the last positions `[count, vocabulary]` in what a model returned for one row."""
    logits: torch.Tensor = output.logits
    return logits[0, -count:]


def output_projection(lm: LanguageModel) -> nn.Module:
    """Raises ModelError if the model has none."""
    projection = lm.model.get_output_embeddings()
    if not isinstance(projection, nn.Module):
        raise ModelError(f"{lm.identity.architecture} has no output projection, so it predicts no tokens")
    return projection


def projected_logits(lm: LanguageModel, final: torch.Tensor, outputs: Sequence[Any]) -> torch.Tensor:
    """Logits `[positions, vocabulary]` from inputs of the output projection `[positions, hidden]`.

    The model runs on one token with its blocks skipped, so that all that it does after the projection is done.
    `outputs` are outputs of all blocks in some pass.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    skipped = final.new_zeros(1, 1, lm.hidden_size)
    with (
        giving(output_projection(lm), final.unsqueeze(0)),
        resumed(lm.blocks, outputs, len(lm.blocks) - 1, skipped),
    ):
        logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False).logits[0]
    return logits
