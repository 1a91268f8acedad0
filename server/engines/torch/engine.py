"""The engine on plain transformers: one thread owns the model and runs step after step.

Owns the thread, the border between it and the event loops, and what may enter. What a step does is in `steps`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import torch

from server.engines.detokenizer import Detokenizer
from server.engines.protocol import (
    Constraint,
    EngineStats,
    EventStream,
    GenerationRequest,
    SteeringChange,
)
from server.engines.torch.admission import (
    check_gates,
    check_no_new_gates,
    check_options,
    check_prompt,
)
from server.engines.torch.constraints.cache import Grammars
from server.engines.torch.constraints.matching import CompiledGrammar, GrammarCompiler, matcher_of
from server.engines.torch.loop import Steps
from server.engines.torch.mailbox import Mailbox, call_in
from server.engines.torch.request import Row
from server.engines.torch.sampling.request_sampler import RowSampler, check_vocabulary
from server.engines.torch.scheduling.budget import Pace
from server.engines.torch.scheduling.prefix_reuse import Prefixes
from server.engines.torch.scheduling.request_state import Sequence
from server.engines.torch.scheduling.scheduler import Scheduler
from steering_vectors.errors import (
    Conflict,
    Overloaded,
    Unavailable,
    UnknownGeneration,
)
from steering_vectors.models.limits import checked_context, eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.cpu.threads import run_apart, use_threads
from steering_vectors.runtime.runner import Runner
from steering_vectors.runtime.tensor_parallel import Channel, Follower, LeadingRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank

logger = logging.getLogger(__name__)

DEFAULT_SLOTS = 16
DEFAULT_QUEUE = 1024
DEFAULT_CHUNK = 256
REMEMBERED = 4096


class TorchEngine:
    """Implements `protocol.Engine`.

    `slots` rows run at once and the rest queue, `max_queue` of them at most. `context` None takes the model's own
    limit, at most 4096; more than the model's limit is a ModelError. `prefill_chunk` is the number of prompt tokens
    computed at most in one step, for all rows together; and as many as take no longer than `max_stall_ms` while others
    decode, None for 1.5 times what a token of these takes. `prefix_reuse`: whether what is computed of a prompt is kept
    for others that begin alike and are steered alike. `static_decoding`: as `choose_runner` takes it.
    `channel`: to the processes that hold the model's other parts, each of which runs `follower_of` at the same time.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        slots: int = DEFAULT_SLOTS,
        context: int | None = None,
        max_queue: int = DEFAULT_QUEUE,
        prefill_chunk: int = DEFAULT_CHUNK,
        max_stall_ms: float | None = None,
        prefix_reuse: bool = True,
        static_decoding: bool | None = None,
        channel: Channel | None = None,
        allow_model_mismatch: bool = False,
    ) -> None:
        self._language_model = language_model
        self._context = checked_context(language_model, context)
        self._max_queue = max_queue
        self._allow_model_mismatch = allow_model_mismatch
        self._eos_ids = eos_ids(language_model)
        self._vocab_size = language_model.vocab_size
        self._grammars = Grammars(GrammarCompiler(language_model.tokenizer, self._eos_ids))
        self._bank, self._runner = run_apart(lambda: _made_for(language_model, slots, self._context, static_decoding))
        if channel is not None:
            self._runner = LeadingRunner(language_model, self._runner, channel)
        chunk = prefill_chunk if self._runner.chunked else self._context * slots
        self._prefixes = Prefixes(slots, self._runner.columns if prefix_reuse else None)
        stall = math.inf if not self._runner.chunked else None if max_stall_ms is None else max_stall_ms / 1000
        pace = Pace(chunk, stall)
        self._scheduler = Scheduler(slots=slots, chunk_tokens=chunk, prefixes=self._prefixes, pace=pace)
        self._steps = Steps(self._runner, self._bank, self._scheduler, pace, eos_ids=self._eos_ids, ended=self._forget)
        self._live: set[str] = set()
        self._ended: dict[str, None] = {}  # the latest, so that a late change is told from a wrong id
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._threads = torch.get_num_threads()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)
        self._thread.start()
        self._begun.wait()

    # What the event loop calls.

    @property
    def language_model(self) -> LanguageModel:
        return self._language_model

    @property
    def context(self) -> int:
        return self._context

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        return await self._grammars.get(constraint)

    def generate(self, request: GenerationRequest) -> EventStream:
        self._check(request)
        mailbox = Mailbox(cancel=lambda: self.cancel(request.id))
        row = Row(
            sequence=Sequence(request),
            sampler=RowSampler(
                request.sampling,
                vocab_size=self._vocab_size,
                eos_ids=self._eos_ids,
                prompt_ids=request.prompt_ids,
                choice=request.choice,
                matcher=matcher_of(request.grammar),
            ),
            detokenizer=Detokenizer(self._language_model.tokenizer, request.prompt_ids, request.sampling.stop),
            mailbox=mailbox,
        )
        self._live.add(request.id)
        self._commands.put(lambda: self._steps.add(row))
        return mailbox

    def set_steering(self, request_id: str, mixture: Mixture) -> Awaitable[SteeringChange]:
        self._check_mixture(mixture)
        self._check_live(request_id)
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[SteeringChange] = loop.create_future()
        self._commands.put(lambda: self._change(request_id, mixture, changed))
        return changed

    def cancel(self, request_id: str) -> bool:
        if request_id not in self._live:
            return False
        self._commands.put(lambda: self._cancel(request_id))
        return True

    def load_profile(self, profile: Profile) -> None:
        profile.check_model(self._language_model.identity, allow_mismatch=self._allow_model_mismatch)

    def unload_profile(self, profile: Profile) -> None:
        """Nothing is kept per profile: running requests hold their own."""

    def stats(self) -> EngineStats:
        return EngineStats(
            slots=self._scheduler.num_slots,
            context=self._context,
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            steps=self._steps.counts["steps"],
            prompt_tokens=self._steps.counts["prompt"],
            generated_tokens=self._steps.counts["generated"],
            steered_tokens=self._steps.counts["steered"],
            cached_tokens=self._steps.counts["cached"],
            finished=dict(self._steps.finished),
            path=self._runner.path,
        )

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._grammars.close()
        done = Mailbox(cancel=lambda: None)
        self._commands.put(lambda: None)
        await done.loop.run_in_executor(None, self._thread.join)
        self._runner.close()
        self._bank.detach()

    def _check(self, request: GenerationRequest) -> None:
        if self._closing or not self._thread.is_alive():
            raise Unavailable("the engine is shut down")
        if request.id in self._live:
            raise Conflict(f"a generation with id {request.id!r} is running already", param="id")
        vocabulary, writes = self._vocab_size, request.sampling.max_tokens != 0
        check_prompt(request.prompt_ids, vocabulary=vocabulary, context=self._context, writes=writes)
        check_vocabulary(request.sampling, self._vocab_size)
        check_options(request, slots=self._scheduler.num_slots)
        for profile in request.projections:
            self.load_profile(profile)
        for mixture in (request.mixture, *(later for _, later in request.schedule)):
            self._check_mixture(mixture)
            check_gates(request, mixture, chunked=self._runner.chunked)
        if len(self._live) >= self._scheduler.num_slots + self._max_queue:
            raise Overloaded(f"{len(self._live)} requests are running or waiting already: try again later")

    # What the engine's thread does.

    def _run(self) -> None:
        _show_name()
        use_threads(self._threads)
        self._begun.set()
        with torch.inference_mode():
            while not self._closing:
                self._take_commands(wait=not self._scheduler.has_work)
                if not self._closing and self._scheduler.has_work:
                    self._step_or_fail()
                self._steps.outbox.deliver()
            self._take_commands(wait=False)
            self._steps.end("cancelled")
            self._steps.outbox.deliver()

    def _step_or_fail(self) -> None:
        """A step that breaks ends the requests it ran, never the thread."""
        try:
            self.step()
        except Exception as error:
            logger.exception("a step failed")
            self._steps.end("error", f"{type(error).__name__} while computing a step", running_only=True)

    def step(self) -> None:
        """One step of all rows."""
        self._steps.step()

    def _check_mixture(self, mixture: Mixture) -> None:
        for term in mixture.terms:
            self.load_profile(term.profile)
        self._bank.check(mixture)

    def _check_live(self, request_id: str) -> None:
        if request_id in self._live:
            return
        if request_id in self._ended:
            raise Conflict(f"generation {request_id!r} has ended: its steering cannot be changed", param="id")
        raise UnknownGeneration(f"there is no generation {request_id!r} here", param="id")

    def _change(self, request_id: str, mixture: Mixture, changed: asyncio.Future[SteeringChange]) -> None:
        """Carry out `set_steering`, and tell the one that waits for it in its own loop."""
        try:
            self._check_live(request_id)
            row = self._steps.row(request_id)
            assert row is not None, "live, and not among the rows"
            check_no_new_gates(row.sequence.conditions, mixture)
            row.sequence.scheduled.clear()
            change = self._steps.steer(row.sequence, mixture)
            call_in(changed.get_loop(), _settle, changed, change)
        except Exception as error:
            call_in(changed.get_loop(), _settle, changed, error)

    def _cancel(self, request_id: str) -> None:
        if (row := self._steps.row(request_id)) is not None:
            self._steps.finish(row, "cancelled")

    def _forget(self, request_id: str) -> None:
        self._live.discard(request_id)
        self._ended[request_id] = None
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _take_commands(self, *, wait: bool) -> None:
        """Carry out what the event loop asked for since the last step; if there is nothing to do, wait for it."""
        if wait and not self._closing:
            self._commands.get()()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return


def follower_of(language_model: LanguageModel, slots: int, context: int, channel: Channel) -> Follower:
    """What a process that does not serve does beside the one that does."""
    bank, runner = _made_for(language_model, slots, context, False)
    return Follower(runner, bank, channel)


def _made_for(
    language_model: LanguageModel, slots: int, context: int, static: bool | None
) -> tuple[AcceleratedBank, Runner]:
    """What steers the model, and what runs it."""
    bank = AcceleratedBank.over(language_model, rows=slots)
    bank.attach()
    return bank, choose_runner(language_model, bank, context=context, static=static)


def _show_name() -> None:
    """Let `top -H`, py-spy and /proc know this thread by its name, which Python keeps to itself before 3.14."""
    with suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name)


def _settle(waiting: asyncio.Future[SteeringChange], outcome: SteeringChange | Exception) -> None:
    if waiting.done():
        return
    if isinstance(outcome, Exception):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)
