"""Whether part of a text can be kept from a model's upper blocks.

Owns the check by measurement: masks have many forms, and a recurrent block carries along what its mask hides. Knows
nothing of what is to be hidden.
"""

from __future__ import annotations

import torch

from steering_vectors.errors import FitError
from steering_vectors.models.hooks import adding, hiding
from steering_vectors.models.loading import LanguageModel

LENGTH, HIDDEN = 12, slice(1, 4)  # of the text that is read for the check, and the part hidden in it
LEAK = 0.005  # of the change that the same part makes where it is seen; hidden it makes none but for rounding


def check_hiding(lm: LanguageModel, first: int) -> None:
    """Raise FitError unless tokens can be hidden from block `first` and those above it.

    A shift is added to three positions' output of the block before; the logits after them must not tell.
    """
    columns = torch.zeros(1, LENGTH, dtype=torch.bool, device=lm.device)
    columns[:, HIDDEN] = True
    nothing = torch.zeros_like(columns)
    try:
        hidden, seen = _change(lm, first, columns, columns), _change(lm, first, columns, nothing)
    except (FitError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(lm) from error
    if not hidden <= LEAK * seen:
        raise _refusal(lm)


def _change(lm: LanguageModel, first: int, shifted: torch.Tensor, hidden: torch.Tensor) -> float:
    """How far the logits after the part move if the positions `shifted` are, while `hidden` ones are."""
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
