"""Write a model and its tokenizer as a GGUF file in any quantisation that the gguf library can produce."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

Type = gguf.GGMLQuantizationType
PERMUTED = ("attn_q.weight", "attn_k.weight")  # of Llama: llama.cpp rotates neighbouring pairs, transformers halves


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: Type = Type.F32,
    *,
    kinds: Mapping[str, Type] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Path:
    """Matrices are quantised to `kind`, or as `kinds` has it by the end of a tensor's name; vectors stay float32.
    `values` are more metadata, by key."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for key, value in (values or {}).items():
        (
            writer.add_array
            if isinstance(value, list)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
        )(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if config.model_type == "llama" and stored.endswith(PERMUTED):
            heads = config.num_attention_heads if "attn_q" in stored else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.detach().to(torch.float32).contiguous().numpy()
        own = next((other for end, other in (kinds or {}).items() if stored.endswith(end)), kind)
        chosen = own if array.ndim > 1 else Type.F32
        writer.add_tensor(stored, quantize(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_qwen(vocabulary: int) -> PreTrainedModel:
    """A random model of another architecture than Llama's, with an output layer of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """A byte-level BPE tokenizer, as llama.cpp's converter stores it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {entry["id"] for entry in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [
            kinds.CONTROL if index in special else kinds.NORMAL if index in tokens else kinds.UNUSED
            for index in range(size)
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
