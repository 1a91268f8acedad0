"""Compiles constraints in threads of their own, and keeps the latest compiled grammars."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from server.engines.errors import Overloaded, Unavailable
from server.engines.mailbox import look_at
from server.engines.protocol import Constraint
from server.engines.torch.constraints.matching import CompiledGrammar, GrammarCompiler

THREADS = 2
MAX_UNFINISHED = 32
MAX_CACHED_GRAMMARS = 16  # some grow to tens of megabytes while texts are written by them
MAX_USES = 128  # of one grammar: its rows share what its lexer may spend


@dataclass(slots=True, eq=False)
class _Entry:
    """A constraint that was asked for."""

    future: Future[CompiledGrammar]
    uses: int = 0

    @property
    def spent(self) -> bool:
        """Whether it must be compiled anew."""
        if not self.future.done():
            return False
        failed = self.future.cancelled() or self.future.exception() is not None
        return failed or self.uses >= MAX_USES or self.future.result().failed


class Grammars:
    """The compiled grammars of one engine. Methods may be called from the event loop only."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="trimtab-grammars")
        self._entries: dict[Constraint, _Entry] = {}  # the latest last
        self._closed = False

    async def get(self, constraint: Constraint) -> CompiledGrammar:
        """The compiled grammar of a constraint. Raises RequestError as the compiler does, Overloaded if too many
        constraints wait, Unavailable once this is closed."""
        entry = self._entries.pop(constraint, None)
        if entry is None or entry.spent:
            entry = self._begin(constraint)
        self._entries[constraint] = entry
        entry.uses += 1
        answer = asyncio.wrap_future(entry.future)
        answer.add_done_callback(look_at)
        try:
            return await asyncio.shield(answer)  # another may wait for the same
        except asyncio.CancelledError:
            if entry.future.cancelled():
                raise _closed() from None
            raise

    def close(self) -> None:
        """Compile nothing more; what is being compiled is finished."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, constraint: Constraint) -> _Entry:
        if self._closed:
            raise _closed()
        self._entries = {one: entry for one, entry in self._entries.items() if not entry.spent}
        finished = [one for one, entry in self._entries.items() if entry.future.done()]
        waiting = len(self._entries) - len(finished)
        if waiting >= MAX_UNFINISHED:
            raise Overloaded(f"{waiting} constraints are being compiled or wait for it: try again later")
        for one in finished[: max(0, len(finished) - MAX_CACHED_GRAMMARS + 1)]:
            del self._entries[one]
        return _Entry(self._threads.submit(self._compiler.compile, constraint))


def _closed() -> Unavailable:
    return Unavailable("the engine is shut down")
