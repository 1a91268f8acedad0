"""The settings of an engine: which model it runs, and how. `trimtab serve` has settings of the same names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_SLOTS = 16
DEFAULT_QUEUE = 1024
DEFAULT_CHUNK = 256
DEFAULT_STEP_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What `build_engine` needs. The first group loads the model, the second runs it.

    `revision` is the commit, tag or branch of a hub id, None its main branch. `chat_template` is the name of one of the
    tokenizer's templates or a Jinja file, None its default one. `slots` None means 16, or on CUDA as many as memory
    holds. `context` None means the model's own limit, at most 4096. `prefill_chunk` bounds the prompt tokens of one
    step, and `max_stall_ms` the time they may take while other rows decode; None allows 1.5 times the time of a
    decoding step. `cpu_prepack` None means where it is expected to be faster, and `cuda_graphs` None on CUDA where the
    model allows it. An engine whose step takes longer than `step_timeout_seconds` counts as hung.
    """

    model: str = "demo"
    revision: str | None = None
    chat_template: str | None = None
    adapter: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    tensor_parallel: bool = False
    cpu_prepack: bool | None = None
    quantize: Literal["int8", "int4", "gguf"] | None = None
    threads: int | None = None
    gpu_memory_utilization: float | None = None

    slots: int | None = None
    context: int | None = None
    max_queue: int = DEFAULT_QUEUE
    prefill_chunk: int = DEFAULT_CHUNK
    max_stall_ms: float | None = None
    prefix_reuse: bool = True
    cuda_graphs: bool | None = None
    allow_model_mismatch: bool = False
    step_timeout_seconds: float = DEFAULT_STEP_TIMEOUT


DEFAULT_CONFIG = EngineConfig()
