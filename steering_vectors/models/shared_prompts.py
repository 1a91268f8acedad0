"""Keys and values of prompts that are computed once for all rows that continue them, with gradients if wanted.

Whether a model can do so is found out by measurement.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from steering_vectors.models.forward import evaluating, takes
from steering_vectors.models.loading import LanguageModel

NEEDED = ("attention_mask", "position_ids", "past_key_values", "use_cache")  # arguments of the model's forward
PROMPTS, OWNERS, REST = (5, 3), (0, 0, 1), 4  # lengths in tokens of the rows that the check compares
TOLERANCE = 1e-3  # of the logits' range

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: of the prompts, and of the rows while these are computed."""

    owners: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.owners is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        keys = torch.cat([self.keys[self.owners], key_states], dim=-2)
        return keys, torch.cat([self.values[self.owners], value_states], dim=-2)


class SharedPrompts(Cache):  # type: ignore[misc]
    """The cache of a pass over prompts, and after `share` of any number of passes over rows that continue them.

    The rows' own keys and values are not kept, and a prompt's are copied to its rows in one layer at a time.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(layers=[_Layer() for _ in range(lm.num_layers)])

    def share(self, owners: torch.Tensor) -> None:
        """In the following passes, row r continues prompt `owners[r]`."""
        for layer in self.layers:
            layer.owners = owners

    @property
    def nbytes(self) -> int:
        return sum(int(one.nbytes) for layer in self.layers for one in (layer.keys, layer.values))


def shares_prompts(lm: LanguageModel) -> bool:
    """Whether the model gives the same logits after cached prompts as in one pass, also with padding between a prompt
    and the rest. Positions that are counted along the columns fail it, and so do recurrent states."""
    if lm.model not in _known:
        _known[lm.model] = _measured(lm)
    return _known[lm.model]


def _measured(lm: LanguageModel) -> bool:
    if not all(takes(lm.model, argument) for argument in NEEDED):
        return False
    try:
        made = DynamicCache(config=lm.model.config).layers
        if len(made) != lm.num_layers or any(type(layer) is not DynamicLayer for layer in made):
            return False  # the architecture needs another kind of cache
        with evaluating(lm.model), torch.no_grad():
            whole, parted = _logits(lm)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return bool((whole - parted).abs().max() <= TOLERANCE * (whole.max() - whole.min()))


def _logits(lm: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last logits of rows with common prompts, in a pass for each row and after cached prompts. The caller may have
    hooks that compute no others."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(lm.vocab_size, (length,), generator=draw).to(lm.device) for length in PROMPTS]
    rests = torch.randint(lm.vocab_size, (len(OWNERS), REST), generator=draw).to(lm.device)
    rows = [torch.cat([prompts[owner], rest]) for owner, rest in zip(OWNERS, rests, strict=True)]
    whole = [lm.model(input_ids=row[None], use_cache=False).logits[0, -1] for row in rows]
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lengths = torch.tensor(PROMPTS, device=lm.device).unsqueeze(1)
    known = (torch.arange(ids.shape[1], device=lm.device) < lengths).long()
    owners, cache = torch.tensor(OWNERS, device=lm.device), SharedPrompts(lm)
    places = torch.arange(ids.shape[1], device=lm.device).expand_as(ids)
    lm.model(input_ids=ids, attention_mask=known, position_ids=places, past_key_values=cache, use_cache=True)
    cache.share(owners)
    seen = torch.cat([known[owners], torch.ones_like(rests)], 1)
    places = lengths[owners] + torch.arange(REST, device=lm.device)
    parted = lm.model(
        input_ids=rests, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True
    ).logits[:, -1]
    return torch.stack(whole).float(), parted.float()
