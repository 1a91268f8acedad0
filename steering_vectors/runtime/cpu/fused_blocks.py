"""Llama-like decoder blocks in one kernel call, or eight, in place of about sixty operations.

Such a block has a norm, attention with rotary embeddings, a second norm and a gated SiLU network, both added to the
residual stream (Llama, Mistral, Qwen 2 and 3, SmolLM). They are recognised by their parts. A block keeps its hooks, and
a pass that the kernels do not take runs its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.kernels import (
    MAX_HEAD_SIZE,
    SUFFIXES,
    Heads,
    Kernels,
    PassInputs,
    Product,
    WholeBlock,
    load,
)
from steering_vectors.runtime.cpu.packing import PackedLinear, joint_product
from steering_vectors.runtime.runner import BatchedRunner
from steering_vectors.runtime.slot_cache import SlotCache, active_metadata
from steering_vectors.steering.accelerated_bank import AcceleratedBank

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


def can_fuse(blocks: Sequence[nn.Module]) -> bool:
    """Whether all blocks are Llama-like, their layers are packed and this processor has kernels."""
    return load() is not None and all(map(is_llama_like, blocks))


def could_fuse(blocks: Sequence[nn.Module]) -> bool:
    """Whether `can_fuse` would be true if their layers were packed."""
    return load() is not None and all(is_llama_like(block, nn.Linear) for block in blocks)


class FusedRunner(BatchedRunner):
    """Replaces the forward of each block while it is open. Raises ModelError if the blocks cannot be fused."""

    path = "batched, fused blocks"

    def __init__(self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int) -> None:
        kernels, blocks, current = load(), language_model.blocks, _CurrentPass()
        if kernels is None or not can_fuse(blocks):
            raise ModelError("these blocks cannot be fused")
        self._fused = [FusedBlock(kernels, block, layer, current, bank) for layer, block in enumerate(blocks)]
        super().__init__(language_model, bank, context=context)
        for block in self._fused:
            block.attach()

    def close(self) -> None:
        super().close()
        for block in self._fused:
            block.detach()


def is_llama_like(block: Any, kind: type[nn.Module] = PackedLinear) -> bool:
    """Whether a block has exactly the parts that are fused, with linear layers of this kind."""
    if set(dict(block.named_children())) != PARTS:
        return False
    attention, mlp = block.self_attn, block.mlp
    parts = set(dict(attention.named_children())) - {"rotary_fn"}
    return (
        parts in (PROJECTIONS, PROJECTIONS | HEAD_NORMS)
        and {"gate_proj", "up_proj", "down_proj"} <= set(dict(mlp.named_children()))
        and type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and all(_epsilon(norm) is not None for norm in (block.input_layernorm, block.post_attention_layernorm))
        and all(isinstance(layer, kind) for layer in _linear_layers(block))
        and attention.head_dim <= MAX_HEAD_SIZE
        and block.input_layernorm.weight.dtype in SUFFIXES
    )


class _CurrentPass:
    """The inputs of the current pass, converted once for all blocks."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._latest: PassInputs | None = None

    def inputs(self, hidden: torch.Tensor, size: int, mask: Any, rotary: Any) -> PassInputs | None:
        """The pass's inputs for heads of `size`; None if the kernels do not take them."""
        metadata = active_metadata()
        now = (metadata, mask, rotary)
        if len(self._of) == len(now) and all(map(is_, self._of, now)):
            return self._latest
        expected = ((*hidden.shape[:2], size), hidden.dtype)
        known = mask is not None and rotary is not None and mask.dtype == torch.bool
        suits = known and all((tuple(one.shape), one.dtype) == expected for one in rotary)
        self._of, self._latest = now, PassInputs(rotary, metadata.row_index, metadata.columns, mask) if suits else None
        return self._latest


class FusedBlock:
    """Replaces a block's `forward`. Raises ModelError if its layers are not packed in the groups it reads them in."""

    def __init__(self, kernels: Kernels, block: Any, layer: int, current: _CurrentPass, bank: AcceleratedBank) -> None:
        self._kernels, self._block, self._layer, self._current, self._bank = kernels, block, layer, current, bank
        self._plain = block.forward
        attention, mlp = block.self_attn, block.mlp
        self._first, self._second = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self._joined = joint_product([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = joint_product([attention.o_proj])
        self._gate_up = joint_product([mlp.gate_proj, mlp.up_proj])
        self._down = joint_product([mlp.down_proj])
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
        products = (self._joined, self._output, self._gate_up, self._down)
        known = [product for product in products if isinstance(product, Product)]
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
        rotary = kwargs.get("position_embeddings")
        given = self._current.inputs(hidden_states, self._heads.size, kwargs.get("attention_mask"), rotary)
        if given is None or not layer.is_initialized:
            return self._plain(hidden_states, *args, **kwargs)
        if self._whole is not None:
            shift = self._bank.claim(self._layer, len(hidden_states))
            return self._whole(hidden_states.contiguous(), layer.keys, layer.values, given, shift)
        return self._in_parts(hidden_states.contiguous(), layer, given)

    def _in_parts(self, hidden: torch.Tensor, layer: Any, given: PassInputs) -> torch.Tensor:
        kernels = self._kernels
        joined = self._joined(kernels.norm(hidden, *self._first))
        seen = kernels.attend(self._heads, joined, layer.keys, layer.values, given)
        hidden = self._output(seen, added=hidden)
        both = self._gate_up(kernels.norm(hidden, *self._second))
        return self._down(kernels.gated(both), added=hidden)


def _linear_layers(block: Any) -> list[nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    epsilon = _epsilon(module)
    assert epsilon is not None
    return module.weight.detach(), epsilon


def _epsilon(module: Any) -> float | None:
    """The epsilon of an RMS norm; None for any other module."""
    if "RMSNorm" not in type(module).__name__:
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return None if epsilon is None else float(epsilon)
