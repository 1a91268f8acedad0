"""Models of known shapes with random weights, for speed benchmarks without checkpoints.

Speed does not depend on the values of the weights. Each shape has a byte-level BPE tokenizer of its vocabulary's size,
so decoding text costs the same. `save_shape` writes a directory for `--model`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from steering_vectors.models.loading import LanguageModel, load_model, wrap_model

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
}
EOS = 0


def model_of(
    name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str | torch.device = "cpu"
) -> LanguageModel:
    """The demo model, a directory, or one of `SHAPES` with random weights, created on the device."""
    if name not in SHAPES:
        names = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
        return load_model(name, dtype=names[dtype], device=str(device))
    torch.manual_seed(seed)
    fields = dict(SHAPES[name])
    config = AutoConfig.for_model(
        fields.pop("model_type"), bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS, **fields
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return wrap_model(model, tokenizer_of(config.vocab_size), name=name)


def save_shape(name: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a shape's model and tokenizer, unless they exist."""
    target = directory / name
    if not (target / "model.safetensors").exists():
        made = model_of(name, dtype=dtype)
        made.tokenizer.save_pretrained(target)
        made.model.save_pretrained(target)
    return target


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `size` tokens, whose merges join random pairs of shorter tokens."""
    draw = random.Random(0)
    known = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = [token for token in known[1:] if token.isascii() and token.isalpha()] + ["Ġ"]
    seen, merges = set(known), []
    parts = list(letters)
    while len(known) < size:
        one, other = draw.choice(parts), draw.choice(letters)
        if one + other not in seen and len(one) < 8:
            seen.add(one + other)
            known.append(one + other)
            merges.append((one, other))
            parts.append(one + other)
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(known)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
