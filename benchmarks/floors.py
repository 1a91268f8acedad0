"""What a decode step costs at the least: the bytes it must read, over the bandwidth that a device is measured to have.

A step reads every weight once, of the embedding table the rows' tokens only unless the projection shares it, and each
row's keys and values once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from steering_vectors.models import LanguageModel

MOVED = {"cpu": 2**28, "cuda": 2**33}  # bytes of a copy, far more than caches hold


def bandwidth(device: torch.device, *, moved: int | None = None, repeats: int = 5) -> float:
    """Bytes a second, read and written, of the best of a few copies of a large tensor."""
    source = torch.ones((moved or MOVED[device.type]) // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / min(seconds[1:])


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes: all weights of a step of no rows, what each row adds to these, and a position's keys and values."""

    weights: int
    row: int
    position: int

    @classmethod
    def of(cls, language_model: LanguageModel) -> Reads:
        """Of a model whose layers are not packed yet."""
        model = language_model.model
        embedding, projection = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
        shared = embedding.data_ptr() == projection.data_ptr()
        config, size = model.config.get_text_config(), embedding.element_size()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights if shared else weights - embedding.numel() * size,
            embedding.shape[1] * size,
            2 * config.num_hidden_layers * config.num_key_value_heads * head * size,
        )

    def step(self, *, rows: int, context: int) -> int:
        return self.weights + rows * (self.row + context * self.position)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
