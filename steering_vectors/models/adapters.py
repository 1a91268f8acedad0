"""A LoRA in peft's format, merged into the model it was made for.

Owns reading such a folder. Knows nothing of how adapters are trained.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from steering_vectors.errors import ModelError, first_line

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def merge_adapter(network: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The network with the adapter's updates added to its weights; it forgets where it was loaded from, since it is
    another model now. Raises ModelError for a folder that holds no such adapter, or one of another model."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: it is not an adapter in peft's format (safetensors)")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs peft: pip install 'trimtab[rahf]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers for an attribute's old name
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    except Exception as error:  # a stranger's files: anything can be wrong in them
        raise ModelError(f"adapter {folder} cannot be put into this model: {first_line(error)}") from error
    merged.config.name_or_path = ""
    return cast(PreTrainedModel, merged.eval().requires_grad_(False))
