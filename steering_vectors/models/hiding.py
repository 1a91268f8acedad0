"""Checks, by measurement, whether part of a text can be hidden from a model's upper blocks.

Attention masks have many forms, and a recurrent block carries along what its mask hides.
"""

from __future__ import annotations

import torch

from steering_vectors.errors import FitError
from steering_vectors.models.hooks import adding, hiding
from steering_vectors.models.loading import LanguageModel

LENGTH, HIDDEN = 12, slice(1, 4)  # tokens of the text that the check reads, and those hidden in it
MAX_LEAK = 0.005  # of the change that the same part makes while it is seen; rounding alone makes some


def check_hiding(lm: LanguageModel, first: int) -> None:
    """Raise FitError unless tokens can be hidden from block `first` and those above it.

    A shift is added to three positions' output of the block before. It must not change the logits after them.
    """
    columns = torch.zeros(1, LENGTH, dtype=torch.bool, device=lm.device)
    columns[:, HIDDEN] = True
    nothing = torch.zeros_like(columns)
    try:
        hidden, seen = _change(lm, first, columns, columns), _change(lm, first, columns, nothing)
    except (FitError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(lm) from error
    if not hidden <= MAX_LEAK * seen:
        raise _refusal(lm)


def _change(lm: LanguageModel, first: int, shifted: torch.Tensor, hidden: torch.Tensor) -> float:
    """How far the logits after the part move if a shift is added at `shifted`, while `hidden` is hidden."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (1, LENGTH), generator=draw).to(lm.device)
    shift = torch.randn(lm.hidden_size, generator=draw).to(lm.device)
    with torch.no_grad(), hiding(lm.blocks[first:], hidden):
        plain = lm.model(input_ids=ids, use_cache=False).logits[:, HIDDEN.stop :]
        with adding(lm.blocks[first - 1], shift, shifted):
            moved = lm.model(input_ids=ids, use_cache=False).logits[:, HIDDEN.stop :]
    return float((moved - plain).float().abs().max())


def _refusal(lm: LanguageModel) -> FitError:
    return FitError(
        f"in {lm.identity.architecture} the instruction cannot be hidden from the upper blocks, which takes masked "
        "attention in each; use option instruction=all"
    )
