"""From settings to a running engine: loads the model, packs it, and sizes its cache."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from server.engines.config import DEFAULT_SLOTS, EngineConfig
from server.engines.torch.engine import TorchEngine, make_runner
from server.engines.torch.scheduling.scheduler import IDLE_PREFILL_FACTOR
from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.limits import checked_context
from steering_vectors.models.loading import DTYPES, LanguageModel, computing_dtype, load_model
from steering_vectors.runtime.cpu.choose_packing import pack_if_faster
from steering_vectors.runtime.cpu.packing import pack
from steering_vectors.runtime.memory import CudaMeter, plan_memory
from steering_vectors.runtime.tensor_parallel import Channel, repeat

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> TorchEngine:
    """Load the model and start its engine; takes seconds to minutes. Raises ModelError."""
    channel = Channel(config.device) if config.tensor_parallel else None
    language_model, slots, context = _loaded(config, channel)
    return TorchEngine(language_model, replace(config, slots=slots, context=context), channel=channel)


def follow(config: EngineConfig) -> None:
    """Hold a part of the model for the process that serves, until that one ends. Raises ModelError."""
    channel = Channel(config.device)
    language_model, slots, context = _loaded(config, channel)
    follow_engine(language_model, slots, context, channel)


def follow_engine(language_model: LanguageModel, slots: int, context: int, channel: Channel) -> None:
    """Repeat what the engine of the process that serves does."""
    bank, runner = make_runner(language_model, slots, context, False)
    repeat(channel, runner, bank)


def _loaded(config: EngineConfig, channel: Channel | None) -> tuple[LanguageModel, int, int]:
    """The model, or this process's part of it, with slots and context."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _check_device(config.device)
    language_model = load_model(
        config.model,
        dtype=config.dtype if config.quantize != "gguf" else "bfloat16",  # as stored: few weights are needed
        device=config.device,
        adapter=config.adapter,
        tensor_parallel=channel is not None,
        chat_template=config.chat_template,
        revision=config.revision,
    )
    logger.info("the weights are %s", _pack(config, language_model))
    slots, context = _sizes(config, language_model)
    return language_model, slots if channel is None else channel.minimum(slots), context


def _pack(config: EngineConfig, language_model: LanguageModel) -> str:
    """Pack the weights as configured; returns what they are then, and why. Raises ModelError if they must be packed and
    cannot be."""
    if config.quantize is not None or config.cpu_prepack:
        pack(language_model.model, config.quantize, dtype=_dtype_over_codes(config))
        return "packed, as configured" if config.quantize is None else f"packed in {config.quantize}, as configured"
    if config.cpu_prepack is not None:
        return "plain, as configured"
    return "plain: the model is split" if config.tensor_parallel else pack_if_faster(language_model)


def _dtype_over_codes(config: EngineConfig) -> torch.dtype | None:
    """The dtype of a model over the codes of a GGUF file, whose plain weights are loaded in another."""
    if config.quantize != "gguf":
        return None
    return DTYPES.get(config.dtype) or computing_dtype(torch.bfloat16, torch.device(config.device))


def _sizes(config: EngineConfig, language_model: LanguageModel) -> tuple[int, int]:
    """Slots and context: on a GPU, what fits its memory. Raises ModelError if what was asked for does not."""
    context = checked_context(language_model, config.context)
    slots = config.slots or DEFAULT_SLOTS
    if language_model.device.type != "cuda":
        return slots, context
    fitting = plan_memory(
        language_model,
        CudaMeter(language_model.device),
        slots=config.slots,
        context=context,
        tokens=IDLE_PREFILL_FACTOR * config.prefill_chunk,
        utilization=config.gpu_memory_utilization,
    )
    return fitting or slots, context


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise ModelError(f"device {device!r} cannot be used here ({reason}); try device cpu") from error
