"""The fingerprint of a model: a sha256 over a checkpoint's shapes and a fixed sample of its weights.

It reads the stored tensors, so that dtype, packing or quantisation at load do not change it. A model that exists in
memory only is read from its parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

SAMPLES = 16  # values read from each tensor, evenly spaced
SHAPE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def fingerprint_checkpoint(directory: Path, config: PretrainedConfig) -> str:
    """Fingerprint of the safetensors files in a checkpoint's directory, however they are sharded."""
    entries = []
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            entries += [_entry(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118 (not a mapping)
    return _digest(config, sorted(entries))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those its index names, or all there are.

    Other files beside them (another packing of the same weights, an adapter) are not part of it.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(directory / name for name in names)
    return sorted(directory.glob("*.safetensors"))


def fingerprint_parameters(model: PreTrainedModel) -> str:
    """Fingerprint of a model that was never stored, from its parameters in memory."""
    entries = sorted(_entry(name, tensor.detach()) for name, tensor in model.named_parameters())
    return _digest(model.config, entries)


def _entry(name: str, tensor: torch.Tensor | object) -> str:
    shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else list(tensor.get_shape())  # type: ignore[attr-defined]
    last = math.prod(shape) - 1
    places = [np.unravel_index(k * last // (SAMPLES - 1), shape) for k in range(SAMPLES)] if all(shape) else []
    values = [float(tensor[tuple(map(int, place))]) for place in places]  # type: ignore[index]
    return json.dumps([name, shape, values])


def _digest(config: PretrainedConfig, entries: list[str]) -> str:
    text_config = config.get_text_config()
    shape = {name: _field(text_config, name) for name in SHAPE_FIELDS}
    content = json.dumps([shape, entries], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _field(config: PretrainedConfig, name: str) -> Any:
    """A field of the configuration; None if it has none, or if it differs between blocks."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # one value for each block: the tensors' shapes show them
        return None
