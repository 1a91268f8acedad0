"""An engine in a process of its own, behind the same protocol.

The two processes exchange pickled frames over a socket pair. A frame from the child holds everything that happened in
one turn of its event loop, so that all events of a step travel together. If the child dies, the requests under way end
with an error, and a new child is started, which gets the same profiles.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engines.errors import Conflict, Unavailable
from server.engines.mailbox import Mailbox, Receiver, call_in
from server.engines.protocol import (
    Engine,
    EngineInfo,
    EngineStats,
    Event,
    EventStream,
    Finished,
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
METHODS = ("submit", "set_steering", "cancel", "explain", "load_profile", "unload_profile", "close")
TOTALS = ("steps", "prompt_tokens", "cached_tokens", "generated_tokens", "steered_tokens")
ENDED = "the engine's process ended: try again in a moment"


class ProcessEngine:
    """Implements `protocol.Engine`. `ProcessEngine.start` makes one; `make`, which can be pickled, makes the engine in
    the child."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._before = EngineStats()  # the totals of children that have died
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call = 0
        self._mailboxes: dict[str, Mailbox] = {}  # by live id
        self._prompts: dict[str, int] = {}  # tokens, by live id
        self._profiles: dict[str, tuple[Profile, int]] = {}  # by version, with how often it was loaded
        self._ready = False
        self._closing = False

    @classmethod
    async def start(cls, make: Callable[[], Engine]) -> ProcessEngine:
        """Start the child and wait until its engine is made. Raises what `make` raises."""
        engine = cls(make)
        reader = await engine._launch()
        engine._ready = True
        engine._keeper = asyncio.create_task(engine._keep(reader), name="trimtab-engine-process")
        return engine

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    @property
    def pid(self) -> int:
        """The process id of the child."""
        assert self._process is not None
        return self._process.pid

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        ids = [name for request in requests for name in request.ids]
        if live := next((name for name in ids if name in self._mailboxes), None):
            raise Conflict(f"a generation with id {live!r} is running already", param="ids")
        mailbox = Mailbox()
        self._check_ready()
        for request in requests:
            self._mailboxes.update(dict.fromkeys(request.ids, mailbox))
            self._prompts.update(dict.fromkeys(request.ids, len(request.prompt_ids)))
        try:
            await self._call("submit", tuple(requests))
        except BaseException:
            self._forget(ids)
            raise
        return Receiver(mailbox, ids, self._cancel_later)

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
        _, count = self._profiles.get(profile.version, (profile, 0))
        self._profiles[profile.version] = (profile, count + 1)

    async def unload_profile(self, version: str) -> None:
        if version not in self._profiles:
            return
        profile, count = self._profiles.pop(version)
        if count > 1:
            self._profiles[version] = (profile, count - 1)
        if self._ready:
            await self._call("unload_profile", version)

    def stats(self) -> EngineStats:
        now, before = self._stats, self._before
        totals = {name: getattr(now, name) + getattr(before, name) for name in TOTALS}
        reasons = now.finished.keys() | before.finished.keys()
        finished = {reason: now.finished.get(reason, 0) + before.finished.get(reason, 0) for reason in reasons}
        return replace(now, **totals, finished=finished, restarts=before.restarts)

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._ready:
            with suppress(Unavailable, TimeoutError):
                await asyncio.wait_for(self._call("close"), CLOSE_SECONDS)
        self._ready = False
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._reap()
        self._lose("cancelled", None)

    # The child's life.

    async def _launch(self) -> asyncio.StreamReader:
        """Start a child, and return once its engine is made and holds all profiles."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.to_thread(_spawn, theirs)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        _write(self._writer, (self._make, logging.getLogger().getEffectiveLevel()))
        made = await _read(reader)
        if isinstance(made, Exception):
            await self._reap()
            raise made
        self._info, self._stats = made
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

    async def _restart(self) -> asyncio.StreamReader:
        delay = 0.0
        while True:
            await asyncio.sleep(delay)
            delay = min(2 * delay + 0.5, MAX_RESTART_DELAY_S)
            try:
                reader = await self._launch()
                await self._load_again(reader)
            except Exception as error:
                logger.error("the engine could not be started again (%s); next try in %.1f s", error, delay)
                await self._reap()
                continue
            self._ready = True
            return reader

    async def _load_again(self, reader: asyncio.StreamReader) -> None:
        """Give a new child the profiles of the one before."""
        given = dict(self._profiles)
        waiting = {self._put("load_profile", profile) for profile, count in given.values() for _ in range(count)}
        while waiting:
            happened, self._stats = await _read(reader)
            waiting.difference_update(number for number, _, _ in happened)
        for version, (_, count) in given.items():
            for _ in range(count - self._profiles.get(version, (None, 0))[1]):  # unloaded meanwhile
                self._put("unload_profile", version)

    async def _reap(self) -> None:
        """Close the connection, and wait for the child to end."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await asyncio.to_thread(_wait, self._process)

    def _lose(self, reason: Any, error: str | None) -> None:
        """End all that waits for a child that is gone."""
        self._stats = EngineStats()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(Unavailable(ENDED, code="restarting"))
        mailboxes, prompts = self._mailboxes, self._prompts
        self._mailboxes, self._prompts = {}, {}
        for name, mailbox in mailboxes.items():
            mailbox.put(Finished(name, reason, prompt_tokens=prompts[name], error=error))

    # Messages.

    def _check_ready(self) -> None:
        if not self._ready:
            if self._closing:
                raise Unavailable("the engine is shut down")
            raise Unavailable("the engine is being started again: try again in a moment", code="restarting")

    def _send(self, method: str, *arguments: Any) -> int:
        """Send a call; returns its number."""
        self._check_ready()
        return self._put(method, *arguments)

    def _put(self, method: str, *arguments: Any) -> int:
        assert self._writer is not None
        number, self._next_call = self._next_call, self._next_call + 1
        _write(self._writer, (number, method, arguments))
        return number

    async def _call(self, method: str, *arguments: Any) -> Any:
        number = self._send(method, *arguments)
        answer = self._calls[number] = self._loop.create_future()
        try:
            return await answer
        except asyncio.CancelledError:
            with suppress(Unavailable):
                self._send("drop", number)
            raise
        finally:
            self._calls.pop(number, None)

    def _receive(self, frame: tuple[list[Any], EngineStats]) -> None:
        """Take in what happened in one turn of the child."""
        happened, self._stats = frame
        for item in happened:
            if isinstance(item, tuple):
                number, value, error = item
                answer = self._calls.get(number)
                if answer is None or answer.done():
                    continue
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(value)
            elif (mailbox := self._mailboxes.get(item.id)) is not None:
                mailbox.put(item)
                if isinstance(item, Finished):
                    self._forget([item.id])

    def _forget(self, ids: Sequence[str]) -> None:
        for name in ids:
            self._mailboxes.pop(name, None)
            self._prompts.pop(name, None)

    def _cancel_later(self, ids: Sequence[str]) -> None:
        """Cancel choices whose stream was closed. May be called from any thread."""

        def cancel() -> None:
            with suppress(Unavailable):
                for name in ids:
                    if name in self._mailboxes:
                        self._send("cancel", name)

        call_in(self._loop, cancel)


class _Child:
    """What runs in the child: an engine, and the calls of the parent."""

    def __init__(self, engine: Engine, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self._writer = writer
        self._happened: list[Any] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._ids: dict[int, list[str]] = {}  # of the streams

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Carry out calls until the parent closes the connection."""
        with suppress(EOFError, OSError):
            while True:
                number, method, arguments = await _read(reader)
                if method == "drop":
                    self._drop(*arguments)
                    continue
                task = asyncio.create_task(self._answer(number, method, arguments))
                self._tasks[number] = task
                task.add_done_callback(lambda _, number=number: self._tasks.pop(number, None))  # type: ignore[misc]
        await self._engine.close()

    def _drop(self, number: int) -> None:
        """Nobody waits for a call any more: cancel it, or what it began. The last events of what it began are sent all
        the same, since the parent learns from them that it has ended."""
        if number in self._ids:
            self._tasks[-number - 1] = asyncio.create_task(self._cancel(number))
        elif (task := self._tasks.get(number)) is not None:
            task.cancel()

    async def _cancel(self, number: int) -> None:
        for name in self._ids.get(number, ()):
            await self._engine.cancel(name)
        self._tasks.pop(-number - 1, None)

    async def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        value: Any = None
        error: Exception | None = None
        try:
            assert method in METHODS
            value = await getattr(self._engine, method)(*arguments)
            if method == "close":
                await asyncio.gather(*self._streams.values(), return_exceptions=True)
        except Exception as failure:
            error = _sendable(failure)
        if method == "submit" and error is None:
            self._happen((number, None, None))
            self._ids[number] = [name for request in arguments[0] for name in request.ids]
            self._streams[number] = asyncio.create_task(self._forward(number, value))
        else:
            self._happen((number, value, error))

    async def _forward(self, number: int, stream: EventStream) -> None:
        try:
            async for event in stream:
                self._happen(event)
        finally:
            await stream.aclose()
            del self._streams[number], self._ids[number]

    def _happen(self, item: tuple[int, Any, Exception | None] | Event) -> None:
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
        make, level = await _read(reader)
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        engine = await asyncio.to_thread(run_apart, make)
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


def _spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A child that runs this Python with the same import path."""
    descriptor = connection.fileno()
    code = f"from server.engines.process import serve; serve({descriptor})"
    path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
