"""The decision whether a model's weights are packed."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.cpu.choose_packing import pack_if_faster
from steering_vectors.runtime.cpu.kernels import load
from steering_vectors.runtime.cpu.packing import is_packed, packs, unpack
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or load() is None or platform.machine() != "x86_64",
    reason="this machine has no oneDNN or no kernels",
)
BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_with_fused_blocks_is_packed_once(architecture: str) -> None:
    language_model = tiny(architecture)
    layers = 7 * language_model.num_layers + 1
    products = 4 * language_model.num_layers + 1
    assert pack_if_faster(language_model) == f"packed: {layers} linear layers in {products} products, for fused blocks"
    assert is_packed(language_model.model)
    assert pack_if_faster(language_model) == "packed before"
    unpack(language_model.model)
    assert not is_packed(language_model.model)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "falcon_mamba"])
def test_blocks_that_are_not_fused_stay_plain_in_float32(architecture: str) -> None:
    language_model = tiny(architecture)
    assert pack_if_faster(language_model) == (
        "plain: in float32 packed weights are faster in fused blocks only, which this model cannot have here"
    )
    assert not is_packed(language_model.model)


@pytest.mark.skipif(BFLOAT16, reason="oneDNN packs bfloat16 on this processor")
def test_a_processor_without_bfloat16_stays_plain() -> None:
    language_model = tiny("llama", torch.bfloat16)
    assert pack_if_faster(language_model) == "plain: oneDNN packs no weights in bfloat16 here"
    assert not is_packed(language_model.model)


class LooksAtWeights(LlamaForCausalLM):
    """A model whose code reads the weight of its output layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lm_head.weight.dtype == torch.float32
        return super().forward(*args, **kwargs)


def test_a_model_that_cannot_be_packed_stays_plain() -> None:
    language_model = tiny("llama")
    language_model.model.__class__ = LooksAtWeights
    ids = torch.tensor([[5, 9, 3]])
    plain = language_model.model(input_ids=ids).logits
    assert pack_if_faster(language_model) == (
        "plain: this architecture's linear layers cannot be packed ('PackedLinear' object has no attribute 'weight')"
    )
    assert not is_packed(language_model.model)
    assert torch.equal(language_model.model(input_ids=ids).logits, plain)


def test_half_precision_stays_plain() -> None:
    language_model = tiny("llama", torch.float16)
    assert not packs(language_model.model)
    assert pack_if_faster(language_model) == "plain: oneDNN packs no weights in float16 here"
