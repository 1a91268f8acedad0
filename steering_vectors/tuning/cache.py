"""The cache of tuned weights: one directory per set of inputs, named by their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steering_vectors.cache_directory import cache_directory
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Twin


def tuned_directory(lm: LanguageModel, twins: Sequence[Sequence[Twin]], settings: Mapping[str, Any]) -> Path:
    """The directory of the weights tuned from this model, these examples and these settings."""
    inputs = {"model": asdict(lm.identity), "dtype": str(lm.dtype), "settings": dict(settings)}
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for number, side in enumerate(twins):
        for twin in side:  # one by one, because a single text of all twins takes several times their memory
            key.update(json.dumps([number, twin.positive, twin.negative, twin.response]).encode())
    return cache_directory() / "tuned" / key.hexdigest()[:32]
