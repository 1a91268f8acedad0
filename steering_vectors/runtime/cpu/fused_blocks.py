"""Decoder blocks of the common kind in one call, or in eight, in place of some sixty operations.

The kind: norm, attention with rotary positions, norm, gated SiLU network, both added to the stream (Llama, Mistral,
Qwen 2 and 3, SmolLM and their like). Which blocks are of it is read off their parts, and proven by the comparison that
every runner passes. A block keeps its hooks, and all other passes go its own way. Owns what a block is made of; knows
nothing of rows' requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.runtime.cpu.kernels import LARGEST_HEAD, SUFFIXES, Heads, Kernels, Pass, WholeBlock, load
from steering_vectors.runtime.cpu.packing import PackedLinear, joined_weight
from steering_vectors.runtime.slot_cache import SlotCache, active_metadata
from steering_vectors.steering.accelerated_bank import AcceleratedBank

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


def can_fuse(blocks: Sequence[nn.Module]) -> bool:
    """Whether all blocks are of the kind, their layers packed, and there are kernels for this processor."""
    return load() is not None and all(map(is_of_the_kind, blocks))


def fused_blocks(blocks: Sequence[nn.Module], bank: AcceleratedBank) -> list[FusedBlock]:
    """A faster forward for each block, not attached yet. Raises ModelError if the blocks cannot be fused."""
    kernels = load()
    if kernels is None or not can_fuse(blocks):
        raise ModelError("the blocks are of a kind that is not fused")
    passes = _Passes()
    return [FusedBlock(kernels, block, layer, passes, bank) for layer, block in enumerate(blocks)]


def is_of_the_kind(block: Any) -> bool:
    """Whether a block has the parts that are fused, and none besides."""
    if set(dict(block.named_children())) != PARTS:
        return False
    attention, mlp = block.self_attn, block.mlp
    parts = set(dict(attention.named_children())) - {"rotary_fn"}
    return (
        parts in (PROJECTIONS, PROJECTIONS | HEAD_NORMS)
        and {"gate_proj", "up_proj", "down_proj"} <= set(dict(mlp.named_children()))
        and type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and all(_epsilon(norm) is not None for norm in (block.input_layernorm, block.post_attention_layernorm))
        and all(isinstance(layer, PackedLinear) for layer in _linear_layers(block))
        and attention.head_dim <= LARGEST_HEAD
        and block.input_layernorm.weight.dtype in SUFFIXES
    )


class _Passes:
    """The pass that is under way, described once for all of its blocks."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._latest: Pass | None = None

    def of(self, hidden: torch.Tensor, size: int, mask: Any, turn: Any) -> Pass | None:
        """None if what the blocks are given is not what the kernels take, of heads of `size`."""
        metadata = active_metadata()
        now = (metadata, mask, turn)
        if len(self._of) == len(now) and all(map(is_, self._of, now)):
            return self._latest
        expected = ((*hidden.shape[:2], size), hidden.dtype)
        known = mask is not None and turn is not None and mask.dtype == torch.bool
        suits = known and all((tuple(one.shape), one.dtype) == expected for one in turn)
        self._of, self._latest = now, Pass(turn, metadata.row_index, metadata.columns, mask) if suits else None
        return self._latest


class FusedBlock:
    """Takes the place of a block's `forward`. Raises ModelError if its layers were not packed as they are used."""

    def __init__(self, kernels: Kernels, block: Any, layer: int, passes: _Passes, bank: AcceleratedBank) -> None:
        self._kernels, self._block, self._layer, self._passes, self._bank = kernels, block, layer, passes, bank
        self._plain = block.forward
        attention, mlp = block.self_attn, block.mlp
        self._first, self._second = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self._joined = joined_weight([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = joined_weight([attention.o_proj])
        self._gate_up = joined_weight([mlp.gate_proj, mlp.up_proj])
        self._down = joined_weight([mlp.down_proj])
        size = attention.head_dim
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._heads = Heads(
            attention.q_proj.out_features // size,
            attention.k_proj.out_features // size,
            size,
            attention.scaling,
            None if query_norm is None else query_norm.weight.detach(),
            None if key_norm is None else key_norm.weight.detach(),
            0.0 if query_norm is None else _norm(query_norm)[1],
        )
        self._takes_prompts = kernels.takes_prompts(self._heads, block.input_layernorm.weight.dtype)
        products = [weight.kernel for weight in (self._joined, self._output, self._gate_up, self._down)]
        known = [product for product in products if product is not None]
        self._whole: WholeBlock | None = None
        if len(known) == len(products) and bank.shift.dtype == torch.bfloat16:
            self._whole = WholeBlock(kernels, (self._first, self._second), self._heads, known)

    def attach(self) -> None:
        self._block.forward = self

    def detach(self) -> None:
        del self._block.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, SlotCache) or (hidden_states.shape[1] > 1 and not self._takes_prompts):
            return self._plain(hidden_states, *args, **kwargs)
        layer = cache.layers[self._layer]
        turn = kwargs.get("position_embeddings")
        given = self._passes.of(hidden_states, self._heads.size, kwargs.get("attention_mask"), turn)
        if given is None or not layer.is_initialized:
            return self._plain(hidden_states, *args, **kwargs)
        if self._whole is not None:
            shift = self._bank.claim(self._layer, len(hidden_states))
            return self._whole(hidden_states.contiguous(), layer.keys, layer.values, given, shift)
        return self._in_parts(hidden_states.contiguous(), layer, given)

    def _in_parts(self, hidden: torch.Tensor, layer: Any, given: Pass) -> torch.Tensor:
        kernels = self._kernels
        joined = self._joined.product(kernels.norm(hidden, *self._first))
        seen = kernels.attend(self._heads, joined, layer.keys, layer.values, given)
        hidden = self._output.product(seen, added=hidden)
        both = self._gate_up.product(kernels.norm(hidden, *self._second))
        return self._down.product(kernels.gated(both), added=hidden)


def _linear_layers(block: Any) -> list[nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    """Weight and epsilon of a root mean square norm."""
    epsilon = _epsilon(module)
    assert epsilon is not None
    return module.weight.detach(), epsilon


def _epsilon(module: Any) -> float | None:
    """None if it is no root mean square norm."""
    if "RMSNorm" not in type(module).__name__:
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return None if epsilon is None else float(epsilon)
