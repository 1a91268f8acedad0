"""An engine in a process of its own, behind the same protocol.

The two processes exchange pickled frames over a socket pair. A frame to the child is a call: a number, a method of the
engine and its arguments. A frame from the child holds all answers and events of one turn of its event loop, so that all
events of a step travel together. A child whose engine has failed or hangs is killed. If the child dies, the requests
under way end with an error, and a new child is started, which gets the same profiles.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engines.config import DEFAULT_STEP_TIMEOUT
from server.engines.errors import Conflict, Unavailable
from server.engines.mailbox import Mailbox, Receiver, call_in, settle
from server.engines.protocol import (
    Engine,
    EngineInfo,
    EngineStats,
    EventStream,
    Finished,
    FinishReason,
    GenerationRequest,
    PlanEffect,
    SteeringChange,
    SteeringPlan,
)

if TYPE_CHECKING:
    from steering_vectors.profiles.profile import Profile

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("!Q")  # ahead of each frame
MAX_RESTART_DELAY_S = 30.0
CLOSE_SECONDS = 20.0
PING_SECONDS = 1.0
TOTALS = ("steps", "prompt_tokens", "cached_tokens", "generated_tokens", "steered_tokens", "nonfinite_rows")
ENDED = "the engine's process ended: try again in a moment"


class ProcessEngine:
    """Implements `protocol.Engine`. `ProcessEngine.start` makes one; `make`, which can be pickled, makes the engine in
    the child."""

    info: EngineInfo
    _process: asyncio.subprocess.Process
    _writer: asyncio.StreamWriter
    _keeper: asyncio.Task[None]
    _watcher: asyncio.Task[None]

    def __init__(self, make: Callable[[], Engine], step_timeout: float = DEFAULT_STEP_TIMEOUT) -> None:
        self._make = make
        self._step_timeout = step_timeout
        self._loop = asyncio.get_running_loop()
        self._stats = EngineStats()
        self._before = EngineStats()  # the totals of children that have died
        self._numbers = count()  # of calls
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._live: dict[str, tuple[Mailbox, int]] = {}  # by id, with the number of the prompt's tokens
        self._profiles: list[Profile] = []  # each as often as it was loaded
        self._ready = False
        self._closing = False

    @classmethod
    async def start(cls, make: Callable[[], Engine], step_timeout: float = DEFAULT_STEP_TIMEOUT) -> ProcessEngine:
        """Start the child and wait until its engine is made. Raises what `make` raises. `step_timeout`: seconds after
        which a child that does not answer is killed."""
        engine = cls(make, step_timeout)
        reader = await engine._launch()
        engine._keeper = asyncio.create_task(engine._keep(reader), name="trimtab-engine-process")
        engine._watcher = asyncio.create_task(engine._watch(), name="trimtab-engine-watch")
        return engine

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        lengths = {name: len(request.prompt_ids) for request in requests for name in request.ids}
        submitting = asyncio.create_task(self._submit(tuple(requests), lengths))

        def drop(done: asyncio.Task[Receiver]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._cancel_later(tuple(lengths))

        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(drop)  # the child accepts it all the same
            raise

    async def _submit(self, requests: tuple[GenerationRequest, ...], lengths: Mapping[str, int]) -> Receiver:
        if live := next((name for name in lengths if name in self._live), None):
            raise Conflict(f"a generation with id {live!r} is running already", param="ids")
        mailbox = Mailbox()
        self._live.update({name: (mailbox, length) for name, length in lengths.items()})
        try:
            await self._call("submit", requests)
        except Exception:
            for name in lengths:
                self._live.pop(name, None)
            raise
        return Receiver(mailbox, lengths, self._cancel_later)

    async def set_steering(self, id: str, plan: SteeringPlan) -> SteeringChange:
        changed: SteeringChange = await self._call("set_steering", id, plan)
        return changed

    async def cancel(self, id: str) -> bool:
        return bool(await self._call("cancel", id))

    async def explain(self, plan: SteeringPlan) -> PlanEffect:
        effect: PlanEffect = await self._call("explain", plan)
        return effect

    async def load_profile(self, profile: Profile) -> None:
        await self._call("load_profile", profile)
        self._profiles.append(profile)

    async def unload_profile(self, version: str) -> None:
        places = [place for place, profile in enumerate(self._profiles) if profile.version == version]
        if places:
            del self._profiles[places[0]]
            if self._ready:
                await self._call("unload_profile", version)

    def stats(self) -> EngineStats:
        now, before = self._stats, self._before
        totals = {name: getattr(now, name) + getattr(before, name) for name in TOTALS}
        finished = Counter(now.finished) + Counter(before.finished)
        return replace(now, **totals, finished=dict(finished), restarts=before.restarts)

    def health(self) -> str | None:
        return None  # a child that cannot go on is replaced

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._watcher.cancel()
        if self._ready:
            with suppress(Unavailable, TimeoutError):
                await asyncio.wait_for(self._call("close"), CLOSE_SECONDS)
        self._ready = False
        self._keeper.cancel()
        await asyncio.gather(self._keeper, self._watcher, return_exceptions=True)
        await self._reap()
        self._lose("cancelled", None)

    # The child's life.

    async def _launch(self) -> asyncio.StreamReader:
        """Start a child with the same import path, and return once its engine is made and holds all profiles."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                f"from server.engines.process import serve; serve({theirs.fileno()})",
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path)},
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        given = tuple(self._profiles)
        _write(self._writer, (self._make, logging.getLogger().getEffectiveLevel(), given))
        try:
            made = await _read(reader)
            if isinstance(made, Exception):
                raise made
        except Exception:
            await self._reap()
            raise
        except BaseException:  # the caller was cancelled
            self._process.kill()
            raise
        self.info, self._stats = made
        self._ready = True
        unloaded = Counter(one.version for one in given) - Counter(one.version for one in self._profiles)
        for version in unloaded.elements():  # meanwhile
            self._send("unload_profile", version)
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Receive what the child sends; start another one whenever it dies."""
        while True:
            with suppress(EOFError, OSError):
                while True:
                    self._receive(await _read(reader))
            self._ready = False
            if self._closing:
                return
            logger.error("the engine's process ended; it is started again")
            await self._reap()
            self._before = replace(self.stats(), restarts=self._before.restarts + 1)
            self._lose("error", ENDED)
            reader = await self._restart()

    async def _watch(self) -> None:
        """Kill a child that cannot go on or does not answer."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            if not self._ready:
                continue
            process = self._process
            try:
                problem = await asyncio.wait_for(self._call("health"), self._step_timeout)
            except TimeoutError:
                problem = f"it has not answered in {self._step_timeout:g} s"
            except Exception:  # it ended meanwhile
                continue
            if problem is not None and process.returncode is None:
                logger.error("the engine's process is killed: %s", problem)
                process.kill()
                await process.wait()

    async def _restart(self) -> asyncio.StreamReader:
        delay = 0.0
        while True:
            try:
                return await self._launch()
            except Exception as error:
                delay = min(2 * delay + 0.5, MAX_RESTART_DELAY_S)
                logger.error("the engine could not be started again (%s); next try in %.1f s", error, delay)
                await asyncio.sleep(delay)

    async def _reap(self) -> None:
        """Close the connection, and wait for the child to end."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _lose(self, reason: FinishReason, error: str | None) -> None:
        """End all that waits for a child that is gone."""
        self._stats = EngineStats()
        for call in self._calls.values():
            settle(call, None, Unavailable(ENDED, code="restarting"))
        for name, (mailbox, length) in self._live.items():
            mailbox.put(Finished(name, reason, prompt_tokens=length, error=error))
        self._live.clear()

    # Messages.

    def _send(self, method: str, *arguments: Any) -> int:
        """Send a call; returns its number. Raises Unavailable if there is no child."""
        if not self._ready:
            if self._closing:
                raise Unavailable("the engine is shut down")
            raise Unavailable("the engine is being started again: try again in a moment", code="restarting")
        number = next(self._numbers)
        _write(self._writer, (number, method, arguments))
        return number

    async def _call(self, method: str, *arguments: Any) -> Any:
        number = self._send(method, *arguments)
        self._calls[number] = self._loop.create_future()
        try:
            return await self._calls[number]
        finally:
            del self._calls[number]

    def _receive(self, frame: tuple[list[Any], EngineStats]) -> None:
        """Take in what happened in one turn of the child."""
        happened, self._stats = frame
        for item in happened:
            if isinstance(item, tuple):
                number, value, error = item
                if number in self._calls:
                    settle(self._calls[number], value, error)
            elif item.id in self._live:
                self._live[item.id][0].put(item)
                if isinstance(item, Finished):
                    del self._live[item.id]

    def _cancel_later(self, ids: Sequence[str]) -> None:
        """Cancel choices whose stream was closed. May be called from any thread."""

        def cancel() -> None:
            with suppress(Unavailable):
                for name in ids:
                    if name in self._live:
                        self._send("cancel", name)

        call_in(self._loop, cancel)


class _Child:
    """What runs in the child: an engine, and the calls of the parent."""

    def __init__(self, engine: Engine, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self._writer = writer
        self._happened: list[Any] = []  # in this turn: events, and answers as (number, value, error)
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Carry out calls until the parent closes the connection."""
        with suppress(EOFError, OSError):
            while True:
                call = asyncio.create_task(self._carry_out(*await _read(reader)))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        await self._engine.close()

    async def _carry_out(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = getattr(self._engine, method)(*arguments)
            value = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            self._happen((number, None, _sendable(error)))
            return
        if method == "submit":
            self._happen((number, None, None))
            async for event in value:
                self._happen(event)
            return
        if method == "close":
            others = [call for call in self._calls if call is not asyncio.current_task()]
            await asyncio.gather(*others, return_exceptions=True)  # all events come first
        self._happen((number, value, None))

    def _happen(self, item: Any) -> None:
        """Send an answer or an event at the end of this turn, with all others of the turn."""
        if not self._happened:
            asyncio.get_running_loop().call_soon(self._flush)
        self._happened.append(item)

    def _flush(self) -> None:
        happened, self._happened = self._happened, []
        _write(self._writer, (happened, self._engine.stats()))


def serve(descriptor: int) -> None:
    """The child's main function. A Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(connection: socket.socket) -> None:
    from steering_vectors.runtime.cpu.threads import run_apart

    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        make, level, profiles = await _read(reader)
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        engine = await asyncio.to_thread(run_apart, make)
        for profile in profiles:
            await engine.load_profile(profile)
    except EOFError:
        return
    except Exception as error:
        _write(writer, _sendable(error))
        writer.close()
        await writer.wait_closed()
        return
    gc.collect()
    gc.freeze()  # the model's objects stay: leave them out of garbage collections, which would hold up streams
    _write(writer, (engine.info, engine.stats()))
    await _Child(engine, writer).run(reader)


def _write(writer: asyncio.StreamWriter, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    writer.write(LENGTH.pack(len(data)) + data)


async def _read(reader: asyncio.StreamReader) -> Any:
    """The next frame. Raises EOFError at the end of the connection."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same and can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
