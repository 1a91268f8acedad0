"""Merging a LoRA in peft's format into the model it was made for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from steering_vectors.errors import ModelError, first_line

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def merge_adapter(network: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The network with the adapter's updates added to its weights.

    It is another model then, so its path is cleared. Raises ModelError for a folder without such an adapter, or with
    one of another model.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: it is not an adapter in peft's format (safetensors)")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs peft: pip install 'trimtab[rahf]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute of transformers by its old name
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    except Exception as error:  # anything can be wrong in these files
        raise ModelError(f"adapter {folder} cannot be put into this model: {first_line(error)}") from error
    merged.config.name_or_path = ""
    return cast(PreTrainedModel, merged.eval().requires_grad_(False))
