"""The minimum time of a decode step: its bytes over the device's measured bandwidth, or its operations over the
measured rate, whichever is longer.

A step reads every weight once, and the keys and values of each row once. Of an untied embedding table it reads only the
rows' tokens. Every row multiplies by every weight, and its queries multiply by the keys and values that they see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from steering_vectors.models.gguf_codes import Codes, load_codes
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.threads import run_apart

LARGE = {"cpu": 2**28, "cuda": 2**33}  # bytes of a tensor, far more than the caches
BITS = {"int8": (8.0, 8.0), "int4": (4.5, 8.0)}  # per weight, and per weight of the output layer
SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of two matrices
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Device:
    """Measured rates per second: bytes read, and operations of matrix products in a model's dtype."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Device:
        return run_apart(lambda: cls(bandwidth(device), rate(device, dtype)))


def bandwidth(device: torch.device, *, size: int | None = None) -> float:
    """Bytes per second: read from a large tensor on a CPU, read and written by copying it on other devices."""
    source = torch.ones((size or LARGE[device.type]) // 4, device=device)
    if device.type == "cpu":
        return source.numel() * 4 / _best(device, lambda: torch.dot(source, source))
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(device, lambda: target.copy_(source))


def rate(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> float:
    """Operations per second for the product of two square matrices. A multiply-add counts as two operations."""
    side = side or SIDE[device.type]
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _best(device, lambda: matrix @ matrix)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a model's step: bytes of all weights, of each row, and of the keys and values of each position;
    operations of each row's token, and of each position that it sees."""

    weights: int
    row: int
    position: int
    token_operations: int
    position_operations: int

    @classmethod
    def of(cls, language_model: LanguageModel, quantize: str | None = None) -> Cost:
        """The cost for a model with unpacked layers. `quantize` is that of a server."""
        model = language_model.model
        embedding, projection = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        count = sum(one.numel() for one in model.parameters())
        if embedding.data_ptr() != projection.data_ptr():
            count -= embedding.numel()
        config, size = model.config.get_text_config(), embedding.element_size()
        inner, output = _bits(language_model, quantize)
        read = ((count - projection.numel()) * inner + projection.numel() * output) / 8
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights=int(read),
            row=embedding.shape[1] * size,
            position=2 * config.num_hidden_layers * config.num_key_value_heads * head * size,
            token_operations=2 * count,
            position_operations=4 * config.num_hidden_layers * config.num_attention_heads * head,
        )

    def floor_ms(self, device: Device, *, rows: int, context: int) -> float:
        """Milliseconds of a step in which each row sees `context` positions."""
        read = self.weights + rows * (self.row + context * self.position)
        operations = rows * (self.token_operations + context * self.position_operations)
        return 1e3 * max(read / device.bandwidth, operations / device.rate)


def _bits(language_model: LanguageModel, quantize: str | None) -> tuple[float, float]:
    """Bits per weight, and per weight of the output layer."""
    model = language_model.model
    if quantize is None:
        plain = 8.0 * model.get_output_embeddings().weight.element_size()
        return plain, plain
    if quantize != "gguf":
        return BITS[quantize]
    codes = load_codes(Path(model.config.name_or_path))
    outer = {name for name in codes if not name.startswith("model.layers.")}
    return _mean_bits(codes[name] for name in codes.keys() - outer), _mean_bits(codes[name] for name in outer)


def _mean_bits(codes: Iterable[Codes]) -> float:
    known = list(codes)
    return 8 * sum(one.groups.numel() for one in known) / sum(one.outputs * one.inputs for one in known)


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    seconds = []
    for _ in range(REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
