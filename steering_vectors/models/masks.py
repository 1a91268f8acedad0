"""What an attention mask becomes when some columns are to be unseen by what follows them.

Owns the forms in which transformers gives a decoder block its mask. Knows nothing of models or of what columns hold.
"""

from __future__ import annotations

import torch

from steering_vectors.errors import FitError


def hide(mask: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """The mask under which `columns` (bool `[rows, positions]`) are seen by themselves alone: `[rows, 1, q, k]`.

    `mask` is as a block is given it: None for a causal one, bool (True is seen), or numbers added to the scores. The
    result is of the same kind, bool if there was none. Raises FitError for any other form (of two dimensions, or made
    for another kernel).
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
