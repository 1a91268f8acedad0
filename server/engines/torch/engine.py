"""The engine on plain transformers: one thread owns the model and runs step after step."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from server.engines.config import DEFAULT_CONFIG, DEFAULT_SLOTS, EngineConfig
from server.engines.errors import Conflict, Overloaded, Unavailable, UnknownGeneration, UnknownProfile
from server.engines.mailbox import Mailbox, Receiver, call_in, settle
from server.engines.pool import DaemonPool
from server.engines.protocol import (
    ALL_CAPABILITIES,
    EngineInfo,
    EngineStats,
    EventStream,
    Finished,
    GenerationRequest,
    PlanEffect,
    SteeringChange,
    SteeringPlan,
)
from server.engines.torch.admission import Admission, check_no_new_gates
from server.engines.torch.constraints.matching import GrammarCompiler, Grammars
from server.engines.torch.loop import EngineLoop
from server.engines.torch.plans import ResolvedPlan
from server.engines.torch.scheduling.budget import PrefillBudget
from server.engines.torch.scheduling.prefix_reuse import PrefixCache
from server.engines.torch.scheduling.request_state import RequestState
from server.engines.torch.scheduling.scheduler import Scheduler
from steering_vectors.errors import ProfileError
from steering_vectors.models.limits import checked_context, eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import unit_shifts
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.cpu.spinning import spinning_unless_shared
from steering_vectors.runtime.cpu.threads import run_apart, use_threads
from steering_vectors.runtime.runner import Runner
from steering_vectors.runtime.tensor_parallel import Channel, LeadingRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # for a step that runs to end
SHUT_DOWN = "the engine is shut down"
MAX_ENDED_IDS = 4096  # remembered, so that a late change is told from a wrong id

Result = TypeVar("Result")


class TorchEngine:
    """Implements `protocol.Engine`.

    Of `config` only what runs the model is used here; `build_engine` loads it. `channel` leads to the processes that
    hold the model's other parts, each of which calls `build.follow_engine` at the same time.
    """

    def __init__(
        self, language_model: LanguageModel, config: EngineConfig = DEFAULT_CONFIG, *, channel: Channel | None = None
    ) -> None:
        slots = config.slots or DEFAULT_SLOTS
        context = checked_context(language_model, config.context)
        self._language_model = language_model
        self._config = config
        self._eos_ids = eos_ids(language_model)
        self._grammars = Grammars(GrammarCompiler(language_model.tokenizer, self._eos_ids))
        graphs = config.cuda_graphs if channel is None else False
        self._bank, self._runner = run_apart(lambda: make_runner(language_model, slots, context, graphs))
        if channel is not None:
            self._runner = LeadingRunner(language_model, self._runner, channel)
        chunk = config.prefill_chunk if self._runner.chunked else context * slots
        self._prefixes = PrefixCache(slots, self._runner.columns if config.prefix_reuse else None)
        stall = None if config.max_stall_ms is None else config.max_stall_ms / 1000
        budget = PrefillBudget(chunk, stall if self._runner.chunked else math.inf)
        self._scheduler = Scheduler(slots=slots, chunk_tokens=chunk, prefixes=self._prefixes, budget=budget)
        self._loop = EngineLoop(
            self._runner,
            self._bank,
            self._scheduler,
            budget,
            eos_ids=self._eos_ids,
            ended=self._ended,
            beat=self._beat,
        )
        self.info = EngineInfo(
            name="torch",
            model_name=language_model.name,
            identity=language_model.identity,
            tokenizer=language_model.tokenizer,
            vocab_size=language_model.vocab_size,
            dtype=str(language_model.dtype).removeprefix("torch."),
            context=context,
            slots=slots,
            capacity=slots + config.max_queue,
            path=self._runner.path,
            capabilities=ALL_CAPABILITIES if self._runner.chunked else ALL_CAPABILITIES - {"gates"},
        )
        self._admission = Admission(self.info, dtype=language_model.dtype, eos_ids=self._eos_ids)
        self._profiles = LoadedProfiles()
        self._requests: dict[str, RequestState | None] = {}  # by id, None while one is being admitted
        self._ended_ids: dict[str, None] = {}  # the latest last
        self._threads = torch.get_num_threads()
        self._beside = DaemonPool(1, "trimtab-admission", prepare=lambda: use_threads(1))
        self._beside.submit(lambda: None).result()  # it has its number of threads before others are made
        torch.set_num_threads(self._threads)  # what one thread sets is the default of later ones
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._closing = False
        self._stopped = False  # no command is carried out any more
        self._failure: str | None = None
        self._busy_since: float | None = None  # since when the thread has been at one pass or command
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)
        self._thread.start()
        self._started.wait()

    # Called from the event loop.

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        self._check_open()
        began = time.perf_counter()
        ids = Counter(name for request in requests for name in request.ids)
        if taken := next((name for name, count in ids.items() if count > 1 or name in self._requests), None):
            raise Conflict(f"a generation with id {taken!r} is running already", param="ids")
        if len(self._requests) + len(ids) > self.info.capacity:
            raise Overloaded(f"{len(self._requests)} requests are running or waiting already: try again later")
        pins = [version for request in requests for _ in request.ids for version in request.versions]
        profiles = self._profiles.acquire(pins)
        self._requests.update(dict.fromkeys(ids))
        try:
            constraints = {request.constraint for request in requests}
            grammars = {one: None if one is None else await self._grammars.get(one) for one in constraints}

            def admit() -> list[RequestState]:
                plans = {plan: self._admission.resolve(plan, profiles) for plan in {one.plan for one in requests}}
                return [
                    state
                    for request in requests
                    for state in self._admission.states(
                        request, plans[request.plan], profiles, grammars[request.constraint]
                    )
                ]

            states = await self._aside(admit)
            mailbox = Mailbox()
            for state in states:
                state.mailbox = mailbox
                if (timeout := state.request.timeout) is not None:
                    state.deadline = began + timeout
                self._requests[state.id] = state
            self._send(lambda: self._loop.add(states))
        except BaseException:
            self._profiles.release(pins)
            for name in ids:
                self._requests.pop(name, None)
            raise
        return Receiver(mailbox, ids, self._cancel)

    async def set_steering(self, id: str, plan: SteeringPlan) -> SteeringChange:
        self._check_open()
        profiles = self._profiles.acquire(plan.versions)
        try:
            resolved = await self._aside(lambda: self._admission.resolve(plan, profiles))
            changed: asyncio.Future[SteeringChange] = asyncio.get_running_loop().create_future()
            self._send(lambda: _carry_out(changed, lambda: self._change(id, resolved)))
        except BaseException:
            self._profiles.release(plan.versions)
            raise
        try:
            return await asyncio.wait_for(changed, self._config.step_timeout_seconds)
        except TimeoutError as error:
            raise Unavailable("the engine does not answer", code="engine_failed") from error

    async def cancel(self, id: str) -> bool:
        return self._cancel((id,))

    async def explain(self, plan: SteeringPlan) -> PlanEffect:
        self._check_open()
        profiles = self._profiles.acquire(plan.versions)
        try:
            return await self._aside(lambda: self._admission.resolve(plan, profiles).effect(self._language_model.dtype))
        finally:
            self._profiles.release(plan.versions)

    async def load_profile(self, profile: Profile) -> None:
        self._check_open()
        profile.check_model(self.info.identity, allow_mismatch=self._config.allow_model_mismatch)
        await self._aside(lambda: unit_shifts(profile, None))
        self._profiles.add(profile)

    async def unload_profile(self, version: str) -> None:
        self._profiles.release((version,))

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            slots_used=self._scheduler.slots_used,
            kv_tokens=self._scheduler.kv_tokens,
            kept_tokens=self._scheduler.kept_tokens,
            profiles=len(self._profiles),
            finished=dict(self._loop.finished),
            **self._loop.counts,
        )

    def health(self) -> str | None:
        if self._failure is not None:
            return self._failure
        if not self._closing and not self._thread.is_alive():
            return "the engine's thread has ended"
        since, limit = self._busy_since, self._config.step_timeout_seconds
        if since is not None and time.monotonic() - since > limit:
            return f"the engine has not finished a step in {limit:g} s"
        return None

    async def close(self) -> None:
        """Takes at most a few seconds: a step that hangs is left to its thread, and its requests end without it."""
        if self._closing:
            return
        hung = self.health() is not None
        self._closing = True
        self._grammars.close()
        with suppress(Unavailable):
            self._send(lambda: None)
        last = time.monotonic() + (0 if hung else CLOSE_SECONDS)
        while self._thread.is_alive() and time.monotonic() < last:
            await asyncio.sleep(0.005)
        self._beside.close()
        if self._thread.is_alive():
            self._abandon()
            return
        self._runner.close()
        self._bank.detach()

    def _abandon(self) -> None:
        """End all requests for their clients, while the engine's thread still holds them."""
        logger.error("the engine's thread does not end: its requests are ended without it")
        with self._sending:
            self._stopped = True
        for state in [state for state in self._requests.values() if state is not None]:
            if state.mailbox is not None:
                end = Finished(state.id, "error", prompt_tokens=state.prompt_length, error="the engine does not answer")
                call_in(state.mailbox.loop, state.mailbox.put, end)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise Unavailable(self._failure, code="engine_failed")
        if self._closing or self._stopped:
            raise Unavailable(SHUT_DOWN)

    def _live(self, id: str) -> RequestState:
        """The state of a live choice. Raises UnknownGeneration or Conflict."""
        if (state := self._requests.get(id)) is not None:
            return state
        if id in self._ended_ids:
            raise Conflict(f"generation {id!r} has ended: its steering cannot be changed", param="id")
        raise UnknownGeneration(f"there is no generation {id!r} here", param="id")

    async def _aside(self, work: Callable[[], Result]) -> Result:
        """Run work that would hold up the event loop."""
        return await self._beside.run(work)

    def _cancel(self, ids: Sequence[str]) -> bool:
        """End choices; whether any of them is live. May be called from any thread."""
        states = [state for name in ids if (state := self._requests.get(name)) is not None]
        if not states:
            return False
        with suppress(Unavailable):  # else they end with the engine
            self._send(lambda: self._loop.cancel(states))
        return True

    def _send(self, command: Callable[[], Any]) -> None:
        """Have the engine's thread do something between two steps. Raises Unavailable if it has ended."""
        with self._sending:
            if self._stopped:
                raise Unavailable(self._failure or SHUT_DOWN)
            self._commands.put(command)

    # Called in the engine's thread.

    def _run(self) -> None:
        _set_thread_name()
        use_threads(self._threads)
        self._started.set()
        with spinning_unless_shared(), torch.inference_mode():
            try:
                while not self._closing:
                    self._turn()
            except BaseException as error:
                logger.critical("the engine failed and computes no more", exc_info=error)
                self._failure = f"the engine failed ({type(error).__name__}): it must be restarted"
            finally:
                self._end()

    def _turn(self) -> None:
        """Carry out commands and one step. A step that fails ends the requests it ran; raises what ends the engine."""
        self._take_commands(wait=not self._scheduler.has_work)
        if not self._closing and self._scheduler.has_work:
            try:
                self.step()
            except Exception as error:
                self._loop.fail_step(error)
        self._loop.outbox.deliver()
        if self._loop.damaged:
            self._loop.rebuild()

    def _end(self) -> None:
        """End everything that waits for the thread."""
        with self._sending:
            self._stopped = True
        for work in (self._end_requests, lambda: self._take_commands(wait=False), self._end_requests):
            try:
                work()
            except BaseException:
                logger.exception("a part of ending the engine failed")
        self._busy_since = None

    def _end_requests(self) -> None:
        self._loop.end("cancelled" if self._failure is None else "error", self._failure)
        self._loop.outbox.deliver()

    def step(self) -> None:
        self._loop.step()

    def _beat(self) -> None:
        self._busy_since = time.monotonic()

    def _take_commands(self, *, wait: bool) -> None:
        """Carry out what was asked for since the last step; if there is nothing to do, wait for it."""
        while True:
            self._busy_since = None
            try:
                command = self._commands.get(block=wait and not self._closing)
            except queue.Empty:
                self._beat()
                return
            wait = False
            self._beat()
            try:
                command()
            except Exception:
                logger.exception("a command to the engine failed")

    def _change(self, id: str, plan: ResolvedPlan) -> SteeringChange:
        """Carry out `set_steering`: the request now holds the plan's profiles in place of those before."""
        released = plan.plan.versions
        try:
            state = self._live(id)
            check_no_new_gates(state.steering.conditions, plan)
            released, state.pinned = state.pinned, (*plan.plan.versions, *state.request.projections)
            self._profiles.acquire(state.request.projections)
            return self._loop.steer(state, plan)
        finally:
            self._profiles.release(released)

    def _ended(self, state: RequestState) -> None:
        self._requests.pop(state.id, None)
        self._profiles.release(state.pinned)
        self._ended_ids[state.id] = None
        if len(self._ended_ids) > MAX_ENDED_IDS:
            del self._ended_ids[next(iter(self._ended_ids))]


class LoadedProfiles:
    """The profiles that an engine holds, by version: each stays as long as it is loaded, or a request holds it. May be
    used from any thread."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._profiles)

    def add(self, profile: Profile) -> None:
        """Hold a profile once more. Raises ProfileError for one that was never stored, which has no version."""
        if not profile.version:
            raise ProfileError(f"profile {profile.name!r} has no version: store it in a file first")
        with self._lock:
            self._profiles.setdefault(profile.version, profile)
            self._uses[profile.version] += 1

    def acquire(self, versions: Iterable[str]) -> dict[str, Profile]:
        """Hold all of these versions once more. Raises UnknownProfile, and then holds none."""
        wanted = tuple(versions)
        with self._lock:
            for version in wanted:
                if version not in self._profiles:
                    raise UnknownProfile(f"no profile of version {version[:8]!r} is loaded", param="version")
            self._uses.update(wanted)
            return {version: self._profiles[version] for version in wanted}

    def release(self, versions: Iterable[str]) -> None:
        """Let go of versions, and drop those that nobody holds any more."""
        with self._lock:
            for version in versions:
                if version not in self._profiles:
                    continue
                self._uses[version] -= 1
                if self._uses[version] <= 0:
                    del self._uses[version], self._profiles[version]


def make_runner(
    language_model: LanguageModel, slots: int, context: int, static: bool | None
) -> tuple[AcceleratedBank, Runner]:
    bank = AcceleratedBank.over(language_model, rows=slots)
    bank.attach()
    return bank, choose_runner(language_model, bank, context=context, static=static)


def _set_thread_name() -> None:
    """Show this thread's name in `top -H`, py-spy and /proc; Python itself does so from 3.14 on."""
    with suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name)


def _carry_out(waiting: asyncio.Future[Any], work: Callable[[], Any]) -> None:
    """Do some work and give its outcome to the one who waits for it in another thread."""
    try:
        outcome: tuple[Any, Exception | None] = (work(), None)
    except Exception as error:
        outcome = (None, error)
    except BaseException:
        call_in(waiting.get_loop(), settle, waiting, None, Unavailable("the engine failed", code="engine_failed"))
        raise
    call_in(waiting.get_loop(), settle, waiting, *outcome)
