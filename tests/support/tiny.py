"""Tiny random models of many architectures, seeded and built in milliseconds.

For each architecture a table gives the `model_type`, the attribute path of the decoder blocks (the reference for the
tests of block finding) and the configuration fields that make it small. Weights have a large enough deviation that
attention matters and greedy decoding does not repeat one token. Windows are small enough to matter within 40 tokens.
These are plain functions, so that benchmarks can import them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.support.tiny_tokenizers import VOCAB, byte_fallback_tokenizer, tiny_tokenizer

__all__ = [
    "ARCHITECTURES",
    "OTHERS",
    "REQUIRED",
    "STEERABLE",
    "TABLE",
    "byte_fallback_tokenizer",
    "save_tiny",
    "tiny_blocks",
    "tiny_model",
    "tiny_tokenizer",
]

HIDDEN = 32
BLOCKS = 3
POSITIONS = 256
WINDOW = 8

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny architecture. `blocks` is the path of its decoder blocks, None if it cannot be steered."""

    model_type: str
    blocks: str | None
    fields: Mapping[str, Any]


def _like_llama(model_type: str, blocks: str | None = "model.layers", omit: str = "", **fields: Any) -> Tiny:
    """A configuration with Llama's field names; `omit` names fields that the architecture does not have."""
    kept = {name: value for name, value in BASE.items() if name not in omit.split()}
    return Tiny(model_type, blocks, {**kept, **fields})


def _like_gpt(model_type: str, **fields: Any) -> Tiny:
    """A configuration with GPT-2's field names."""
    words = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": POSITIONS, "n_inner": 48}
    common = {name: BASE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "tie_word_embeddings")}
    return Tiny(model_type, "transformer.h", {**common, **words, **fields})


def _alternating(kind: str, other: str = "full_attention") -> list[str]:
    return [kind, other, kind]


_WINDOWED = {"sliding_window": WINDOW, "layer_types": _alternating("sliding_attention")}

REQUIRED_TABLE: dict[str, Tiny] = {
    "llama": _like_llama("llama"),
    "qwen3": _like_llama("qwen3"),
    "gemma3_text": _like_llama("gemma3_text", query_pre_attn_scalar=8, **_WINDOWED),
    "mistral": _like_llama("mistral", sliding_window=WINDOW),
    "phi3": _like_llama("phi3"),
    "gpt2": _like_gpt("gpt2"),
    "gpt_neox": _like_llama("gpt_neox", "gpt_neox.layers"),
    "opt": _like_llama("opt", "model.decoder.layers", ffn_dim=48, word_embed_proj_dim=16),
    "falcon": _like_llama("falcon", "transformer.h", omit="head_dim", alibi=False),
    "falcon_alibi": _like_llama("falcon", "transformer.h", omit="head_dim", alibi=True, parallel_attn=False),
    "olmo2": _like_llama("olmo2"),
    "mixtral": _like_llama("mixtral", **MOE),
    "qwen3_moe": _like_llama("qwen3_moe", **MOE),
}

OTHERS_TABLE: dict[str, Tiny] = {
    "apertus": _like_llama("apertus"),
    "arcee": _like_llama("arcee"),
    "bamba": _like_llama("bamba", attn_layer_indices=[1], **MAMBA),
    "bart": Tiny(
        "bart",
        "model.decoder.layers",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "max_position_embeddings": POSITIONS,
            "decoder_layers": BLOCKS,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_layers": BLOCKS,
            "encoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "is_decoder": True,
            "is_encoder_decoder": False,
            "forced_eos_token_id": None,
        },
    ),
    "biogpt": _like_llama("biogpt", "biogpt.layers"),
    "bloom": _like_llama("bloom", "transformer.h", n_layer=BLOCKS, n_head=4),
    "codegen": _like_gpt("codegen", rotary_dim=4),
    "cohere": _like_llama("cohere"),
    "cohere2": _like_llama("cohere2", **_WINDOWED),
    "ctrl": _like_gpt("ctrl", dff=48),
    "dbrx": Tiny(
        "dbrx",
        "transformer.blocks",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": BLOCKS,
            "max_seq_len": POSITIONS,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v2": _like_llama("deepseek_v2", omit="head_dim", **MLA),
    "deepseek_v3": _like_llama("deepseek_v3", omit="head_dim", **MLA),
    "ernie4_5": _like_llama("ernie4_5"),
    "exaone4": _like_llama("exaone4", **_WINDOWED),
    "falcon_h1": _like_llama("falcon_h1", mamba_d_ssm=64, **MAMBA),
    "falcon_mamba": _like_llama("falcon_mamba", "backbone.layers"),
    "gemma": _like_llama("gemma"),
    "gemma2": _like_llama("gemma2", query_pre_attn_scalar=8, **_WINDOWED),
    "gemma3": Tiny(
        "gemma3",
        "model.language_model.layers",
        {
            "tie_word_embeddings": False,
            "text_config": {**BASE, **_WINDOWED, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "gemma3n_text": _like_llama(
        "gemma3n_text",
        None,  # its blocks return four mixed streams (AltUp), not one residual stream
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * BLOCKS,
        **_WINDOWED,
    ),
    "gemma4_text": _like_llama(
        "gemma4_text", vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, **_WINDOWED
    ),
    "glm": _like_llama("glm"),
    "glm4": _like_llama("glm4"),
    "glm4_moe": _like_llama("glm4_moe", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, **MOE),
    "gpt_bigcode": _like_gpt("gpt_bigcode"),
    "gpt_neo": _like_llama(
        "gpt_neo",
        "transformer.h",
        omit="num_hidden_layers num_attention_heads",
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
    ),
    "gpt_oss": _like_llama("gpt_oss", **MOE, **_WINDOWED),
    "gptj": _like_gpt("gptj", rotary_dim=4),
    "granite": _like_llama("granite"),
    "granitemoe": _like_llama("granitemoe", **MOE),
    "granitemoehybrid": _like_llama(
        "granitemoehybrid", shared_intermediate_size=24, layer_types=_alternating("mamba", "attention"), **MOE, **MAMBA
    ),
    "helium": _like_llama("helium"),
    "hunyuan_v1_dense": _like_llama("hunyuan_v1_dense"),
    "jamba": _like_llama("jamba", omit="head_dim", attn_layer_period=3, attn_layer_offset=1, **MOE),
    "lfm2": _like_llama("lfm2", block_auto_adjust_ff_dim=False, layer_types=_alternating("conv")),
    "llama4_text": _like_llama(
        "llama4_text", intermediate_size_mlp=48, attention_chunk_size=WINDOW, no_rope_layer_interval=3, **MOE
    ),
    "mamba": _like_llama("mamba", "backbone.layers"),
    "mamba2": _like_llama("mamba2", "backbone.layers", num_heads=8, state_size=16, n_groups=2),
    "minimax": _like_llama("minimax", layer_types=_alternating("linear_attention"), block_size=WINDOW, **MOE),
    "modernbert-decoder": _like_llama("modernbert-decoder", local_attention=WINDOW),
    "mpt": Tiny(
        "mpt",
        "transformer.blocks",
        {"vocab_size": VOCAB, "d_model": HIDDEN, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": POSITIONS},
    ),
    "nemotron": _like_llama("nemotron"),
    "nemotron_h": _like_llama(
        "nemotron_h",
        omit="num_hidden_layers",
        layers_block_type=["mamba", "moe", "attention", "mamba"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=24,
        **MOE,
    ),
    "olmo": _like_llama("olmo"),
    "olmo3": _like_llama("olmo3", **_WINDOWED),
    "olmoe": _like_llama("olmoe", **MOE),
    "openai-gpt": _like_gpt("openai-gpt"),
    "persimmon": _like_llama("persimmon"),
    "phi": _like_llama("phi"),
    "phimoe": _like_llama("phimoe", **MOE),
    "qwen2": _like_llama("qwen2"),
    "qwen2_moe": _like_llama("qwen2_moe", shared_expert_intermediate_size=24, **MOE),
    "qwen3_next": _like_llama("qwen3_next", shared_expert_intermediate_size=24, **MOE, **LINEAR_ATTENTION),
    "recurrent_gemma": _like_llama(
        "recurrent_gemma",
        lru_width=HIDDEN,
        block_types=["recurrent", "attention", "recurrent"],
        attention_window_size=WINDOW,
    ),
    "rwkv": _like_llama("rwkv", "rwkv.blocks", attention_hidden_size=HIDDEN),
    "seed_oss": _like_llama("seed_oss"),
    "smollm3": _like_llama("smollm3", no_rope_layers=[1, 0, 1]),
    "stablelm": _like_llama("stablelm"),
    "starcoder2": _like_llama("starcoder2", sliding_window=WINDOW),
    "xglm": _like_llama("xglm", d_model=HIDDEN, num_layers=BLOCKS, attention_heads=4, ffn_dim=48),
    "zamba2": _like_llama(
        "zamba2",
        layers_block_type=["mamba", "hybrid", "mamba"],
        num_mem_blocks=1,
        n_mamba_heads=8,
        mamba_d_state=16,
        adapter_rank=8,
    ),
}

TABLE = {**REQUIRED_TABLE, **OTHERS_TABLE}
REQUIRED = tuple(REQUIRED_TABLE)
OTHERS = tuple(OTHERS_TABLE)
ARCHITECTURES: tuple[str, ...] = (*REQUIRED, *OTHERS)
STEERABLE = tuple(name for name, tiny in TABLE.items() if tiny.blocks is not None)


def tiny_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in float32 and eval mode, equal at every call. `overrides` are configuration fields."""
    tiny = TABLE[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(tiny.model_type, **{**tiny.fields, **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _redraw(model)
    return model.eval().requires_grad_(False)


def tiny_blocks(architecture: str, model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks at the architecture's known path."""
    path = TABLE[architecture].blocks
    assert path is not None, f"{architecture} has no residual stream that can be steered"
    return list(model.get_submodule(path))  # type: ignore[call-overload]


def _redraw(model: PreTrainedModel) -> None:
    """Draw matrices with a deviation that preserves the scale at this width, and biases that are not zero."""
    std = 1.2 / math.sqrt(HIDDEN)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if ("experts" in name and parameter.dim() > 1) or name.endswith("sinks"):
            nn.init.normal_(parameter, std=std)
    model.tie_weights()


def save_tiny(architecture: str, directory: Path | str, *, chat_template: bool = True, **overrides: Any) -> Path:
    """Save a tiny model and its byte-level tokenizer in a directory for `load_model`. Returns the directory."""
    directory = Path(directory)
    tiny_model(architecture, **overrides).save_pretrained(directory)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(directory)
    return directory
