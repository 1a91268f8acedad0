"""Write a Llama checkpoint as a GGUF file in bfloat16, without a vocabulary, for llama.cpp.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so rows of query and key weights are permuted.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(directory: Path, target: Path | None = None) -> Path:
    """Write a directory's `model.safetensors` as `target`, or as `model.gguf` beside it."""
    target = target or directory / "model.gguf"
    config = AutoConfig.from_pretrained(directory)
    if config.model_type != "llama":
        raise ValueError(f"only Llama checkpoints can be written as GGUF here, not {config.model_type}")
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    for name, tensor in load_file(directory / "model.safetensors").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rotated = next((count for part, count in heads.items() if part in name), None)
        _add(writer, _renamed(name), tensor if rotated is None else _in_pairs(tensor, rotated))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _describe(writer: gguf.GGUFWriter, config: AutoConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.weight"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{BLOCK[part]}.weight"


def _in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Permute the rows of each head from halves to neighbouring pairs."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor. Matrices stay in bfloat16; vectors become float32, which llama.cpp expects for norms."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().astype(np.uint8, copy=False)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
