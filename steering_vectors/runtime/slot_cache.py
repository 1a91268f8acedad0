"""The slot KV cache and its attention masks.

Each row has a slot, and the key of position p lies in column p of its slot. The cache has transformers' `Cache`
interface, and masks come from the modelling code's own mask functions (causal, sliding, chunked), evaluated at each
row's own positions, so that stock models run unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from steering_vectors.runtime.pages import clear, zeros

Slots = slice | torch.Tensor


class Columns(Protocol):
    """The keys and values of all slots."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first so many positions of one slot to another."""

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first so many positions of two slots."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where one forward pass reads and writes the cache, int64 tensors on the model's device.

    `slots` are the rows' slots in batch order, `positions` `[rows, queries]` absolute positions, `columns`
    `[rows, queries]` where keys are written (padding goes to the spare last column), `length` the number of columns
    read.
    """

    slots: Slots
    row_index: torch.Tensor  # [rows, 1]
    positions: torch.Tensor
    columns: torch.Tensor
    length: int


class _Current(threading.local):
    metadata: AttentionMetadata | None = None


_current = _Current()


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one attention layer, `[slots, heads, context + 1, head size]`, made at its first use."""

    is_compileable = False
    is_sliding = False

    def __init__(self, slots: int, context: int) -> None:
        super().__init__()
        self._shape = (slots, context + 1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        slots, columns = self._shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = zeros((slots, key_states.shape[1], columns, key_states.shape[3]), key_states)
        self.values = zeros((slots, value_states.shape[1], columns, value_states.shape[3]), value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[rows, heads, queries, size]` at the pass's columns; return the keys and values to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        metadata = active_metadata()
        self.keys[metadata.row_index, :, metadata.columns] = key_states.transpose(1, 2)
        self.values[metadata.row_index, :, metadata.columns] = value_states.transpose(1, 2)
        return self.keys[metadata.slots, :, : metadata.length], self.values[metadata.slots, :, : metadata.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return active_metadata().length, 0

    def get_seq_length(self) -> int:
        """The columns read without the queries: models add the two."""
        metadata = active_metadata()
        return metadata.length - metadata.positions.shape[1]

    def get_max_length(self) -> int:
        return self._shape[1] - 1


class SlotCache(Cache):  # type: ignore[misc]
    """KV of all slots. Use it inside `with cache.forward_pass(metadata):` only."""

    def __init__(self, *, layers: int, slots: int, context: int) -> None:
        super().__init__(layers=[SlotLayer(slots, context) for _ in range(layers)])

    @contextmanager
    def forward_pass(self, metadata: AttentionMetadata) -> Iterator[None]:
        """Set the rows and positions that the cache and the masks use for the forward pass inside."""
        if _current.metadata is not None:
            raise RuntimeError("a forward pass through the slot cache is already under way")
        _current.metadata = metadata
        try:
            yield
        finally:
            _current.metadata = None

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                for states in (layer.keys, layer.values):
                    states[[one, other], :, :length] = states[[other, one], :, :length]

    def zero(self, slot: int) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                clear(layer.keys[slot])
                clear(layer.values[slot])


def active_metadata() -> AttentionMetadata:
    if _current.metadata is None:
        raise RuntimeError("the slot cache is used outside of a forward pass of a runner")
    return _current.metadata


def _row_mask(original: Callable[..., Any], *, as_bias: bool) -> Callable[..., Any]:
    """A mask maker that evaluates the model's mask function at each row's own positions in a forward pass over the slot
    cache, and is `original` everywhere else."""

    def make(**arguments: Any) -> Any:
        metadata = _current.metadata
        if metadata is None:
            return original(**arguments)
        count, queries, length = (arguments[name] for name in ("batch_size", "q_length", "kv_length"))
        device = metadata.positions.device
        rows = torch.arange(count, device=device)[:, None, None, None]
        heads = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        keys = torch.arange(length, device=device)[None, None, None, :]
        mask = arguments["mask_function"](rows, heads, metadata.positions[:, None, :, None], keys)
        mask = mask.expand(count, 1, queries, length)
        if not as_bias:
            return mask
        dtype = arguments.get("dtype", torch.float32)
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)

    return make


def install_row_masks() -> None:
    """Register the row-aware mask makers with transformers. Outside of the slot cache nothing changes. Idempotent."""
    for name, as_bias in (("sdpa", False), ("eager", True)):
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not getattr(original, "is_row_aware", False):
            maker = _row_mask(original, as_bias=as_bias)
            maker.is_row_aware = True  # type: ignore[attr-defined]
            AttentionMaskInterface.register(name, maker)
