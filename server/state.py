"""What a running application holds: the engine, the profiles, and whether they are there yet.

Owns loading, which happens beside the event loop so that a server answers /health while its model is being read, and
closing. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from functools import cached_property, partial

import torch

from server.engines.protocol import Engine
from server.engines.torch.engine import TorchEngine, follower_of
from server.engines.torch.scheduling.scheduler import UNDISTURBED
from server.generation.token_texts import TokenTexts
from server.profiles.registry import ProfileRegistry
from server.settings import Settings
from steering_vectors.errors import ModelError, TrimtabError, Unavailable, first_line
from steering_vectors.models.limits import checked_context
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.profiles.files import installed_version
from steering_vectors.runtime.cpu.packing import pack
from steering_vectors.runtime.cpu.threads import run_apart
from steering_vectors.runtime.memory import CudaMeter, plan_memory
from steering_vectors.runtime.tensor_parallel import Channel

logger = logging.getLogger(__name__)


class Service:
    """Belongs to one application. An engine that is given is used, and left open at the end; else one is made."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.created = int(time.time())
        self._given = engine
        self._engine: Engine | None = None
        self._registry: ProfileRegistry | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loaded = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def engine(self) -> Engine:
        """Raises Unavailable until everything is loaded."""
        self._check()
        assert self._engine is not None
        return self._engine

    @property
    def registry(self) -> ProfileRegistry:
        """Raises Unavailable until everything is loaded."""
        self._check()
        assert self._registry is not None
        return self._registry

    @property
    def model_name(self) -> str:
        """The base model's name on /v1."""
        return self.settings.served_model_name or self.engine.language_model.name

    @cached_property
    def fingerprint(self) -> str:
        """Tells one model, its numbers and version of this server from another, as OpenAI's `system_fingerprint`."""
        lm = self.engine.language_model
        described = f"{lm.identity.fingerprint}/{self.settings.quantize or lm.dtype}/{installed_version()}"
        return f"fp_{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.engine.language_model.tokenizer)

    @property
    def most_generations(self) -> int:
        """How many generations the engine takes at once, running and waiting."""
        return self.engine.stats().slots + self.settings.max_queue

    def start(self) -> None:
        """Begin to load."""
        self._loading = asyncio.create_task(self._load(), name="trimtab-loading")

    async def wait_ready(self) -> None:
        """Return once everything is loaded; raise what went wrong if it cannot be."""
        await self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Stop watching and computing; streams that still run end in an error event. May be called again."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._registry is not None:
            await self._registry.stop()
        if self._engine is not None and self._engine is not self._given:
            await self._engine.close()

    async def _load(self) -> None:
        try:
            self._engine = self._given
            if self._engine is None:
                self._engine = await asyncio.to_thread(run_apart, partial(build_engine, self.settings))
            self._registry = ProfileRegistry(self.settings.profiles, self._engine)
            await self._registry.start()
        except Exception as error:
            if not isinstance(error, TrimtabError):
                logger.exception("loading failed")
            self._failure = error
        finally:
            self._loaded.set()

    def _check(self) -> None:
        if not self._loaded.is_set():
            raise Unavailable("the model is being loaded: try again in a moment", code="loading")
        if self._failure is not None:
            raise Unavailable("the server could not load its model or profiles; its log says why")


def build_engine(settings: Settings) -> Engine:
    """Load the model and set up its engine; takes seconds to minutes. Raises ModelError."""
    channel = Channel(settings.device) if settings.tensor_parallel else None
    language_model, slots, context = _loaded(settings, channel)
    return TorchEngine(
        language_model,
        slots=slots,
        context=context,
        max_queue=settings.max_queue,
        prefill_chunk=settings.prefill_chunk,
        max_stall_ms=settings.max_stall_ms,
        prefix_reuse=settings.prefix_reuse,
        static_decoding=settings.cuda_graphs if channel is None else False,
        channel=channel,
        allow_model_mismatch=settings.allow_model_mismatch,
    )


def follow(settings: Settings) -> None:
    """Hold a part of the model for the process that serves, until that one ends. Raises ModelError."""
    channel = Channel(settings.device)
    language_model, slots, context = _loaded(settings, channel)
    follower_of(language_model, slots, context, channel).run()


def _loaded(settings: Settings, channel: Channel | None) -> tuple[LanguageModel, int, int]:
    """The model, or this process's part of it, with slots and context."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _check_device(settings.device)
    language_model = load_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        adapter=settings.adapter,
        tensor_parallel=channel is not None,
    )
    if settings.cpu_prepack or settings.quantize is not None:
        pack(language_model.model, settings.quantize)
    slots, context = _sizes(settings, language_model)
    return language_model, slots if channel is None else channel.minimum(slots), context


def _sizes(settings: Settings, language_model: LanguageModel) -> tuple[int, int]:
    """Slots and context: on a GPU, what fits its memory. Raises ModelError if what was asked for does not."""
    context = checked_context(language_model, settings.context)
    if language_model.device.type != "cuda":
        return settings.slots, context
    plan = plan_memory(
        language_model,
        CudaMeter(language_model.device),
        slots=settings.slots if "slots" in settings.model_fields_set else None,
        context=context,
        tokens=UNDISTURBED * settings.prefill_chunk,
        utilization=settings.gpu_memory_utilization,
    )
    return (settings.slots if plan is None else plan.slots), context


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise ModelError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from error
