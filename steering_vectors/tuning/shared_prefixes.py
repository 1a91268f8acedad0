"""Whether a model can compute a prefix once for all rows of a batch, with gradients. It is found out by measurement."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steering_vectors.models.forward import evaluating, takes
from steering_vectors.models.loading import LanguageModel

MIN_SHARED = 8  # tokens; a shorter prefix is computed in every row
PREFIX, LENGTH = 4, 10  # tokens of the rows that the check compares
TOLERANCE = 1e-3  # of the logits' range

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shares_prefixes(lm: LanguageModel) -> bool:
    """Whether the model gives the same logits after a cached prefix as in one pass, also to a row with padding between
    the prefix and the rest. Positions that are counted along the columns fail it, and so do recurrent states."""
    if lm.model not in _known:
        _known[lm.model] = _measured(lm)
    return _known[lm.model]


def new_cache(lm: LanguageModel) -> dict[str, Any]:
    """Arguments of a forward pass that fills a cache."""
    return {"past_key_values": DynamicCache(config=lm.model.config), "use_cache": True}


def _measured(lm: LanguageModel) -> bool:
    needed = ("attention_mask", "position_ids", "past_key_values", "use_cache")
    if not all(takes(lm.model, argument) for argument in needed):
        return False
    try:
        with evaluating(lm.model):
            whole, parted = _logits(lm)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return bool((whole - parted).abs().max() <= TOLERANCE * (whole.max() - whole.min()))


def _logits(lm: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of two rows with a common prefix, in one pass and in two. Raises ValueError for a cache that
    holds anything but all keys and values."""
    draw = torch.Generator().manual_seed(0)
    prefix, rest = torch.randint(lm.vocab_size, (PREFIX,), generator=draw), LENGTH - PREFIX
    tail = torch.randint(lm.vocab_size, (2, rest), generator=draw)
    short = rest // 2  # padding of the second row
    ids, mask = torch.cat([prefix.expand(2, -1), tail], 1), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1] = torch.cat([tail[1, :short], prefix, tail[1, short:]])
    mask[1, :short] = 0
    positions = torch.stack([torch.arange(LENGTH), (torch.arange(LENGTH) - short).clamp_min(0)])
    ids, mask, positions, prefix, tail = (one.to(lm.device) for one in (ids, mask, positions, prefix, tail))
    cache, beyond = new_cache(lm), torch.ones_like(mask)
    beyond[1, PREFIX : PREFIX + short] = 0
    with torch.no_grad():
        whole = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        lm.model(input_ids=prefix[None], position_ids=positions[:1, :PREFIX], **cache)
        layers = cache["past_key_values"].layers
        if not layers or any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError("the cache is of another kind")
        cache["past_key_values"].batch_repeat_interleave(2)
        last = positions[:, PREFIX:]
        parted = lm.model(input_ids=tail, attention_mask=beyond, position_ids=last, **cache).logits[:, -1]
    return whole.float(), parted.float()
