"""Attention masks that hide some columns from the positions after them, in the forms that transformers uses."""

from __future__ import annotations

import torch

from steering_vectors.errors import FitError


def hide(mask: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """A mask `[rows, 1, q, k]` under which `columns` (bool `[rows, positions]`) are seen by themselves alone.

    `mask` is what a block takes: None for causal attention, bool (True is seen), or numbers added to the scores. The
    result has the same dtype, bool for None. Raises FitError for any other form (two dimensions, or made for another
    kernel).
    """
    length = columns.shape[1]
    if mask is None:
        places = torch.arange(length, device=columns.device)
        mask = (places.unsqueeze(1) >= places).expand(1, 1, length, length)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-2:] != (length, length):
        raise FitError("the blocks' attention masks have a form in which no token can be hidden")
    barred = ~columns[:, None, :, None] & columns[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~barred
    return mask.masked_fill(barred, torch.finfo(mask.dtype).min)
