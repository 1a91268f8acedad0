"""Grammars compiled and kept, the state of each row in its grammar, and the tokens that a batch of rows may take.

The text ends where the grammar lets it end: end-of-sequence tokens are allowed there, and a row whose grammar allows
nothing more is complete. llguidance is an optional package, imported when the first constraint is compiled.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from server.engines.errors import Overloaded, Unavailable, reject
from server.engines.pool import CLOSED, DaemonPool
from server.engines.protocol import Constraint
from server.engines.torch.constraints.lark import (
    NOT_CARRIED_OUT,
    attributes,
    count_rules,
    schemas,
    special_tokens,
    stands_for,
)
from steering_vectors.errors import RequestError, first_line

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

MAX_LEXER_STATES = 50_000  # of a lexer, which has a kilobyte or two for each
MIN_CORES_FOR_THREADS = 4  # with fewer, handing work to another thread costs more than it saves
MAX_REASON = 500  # characters
THREADS = 2  # that compile
STACK_BYTES = 512 * 2**20  # of such a thread, of which only what is touched is used: the compiler recurses
COMPILE_SECONDS = 10.0
MAX_SPARE_THREADS = 8  # in place of those whose grammar takes longer
MAX_RULES = 512  # of a grammar: its tree is as deep as the longest chain of them
MAX_UNFINISHED = 32  # grammars
MAX_LIVE_GRAMMARS = 64  # compiled, in the cache or held by requests
MAX_CACHED_GRAMMARS = 16  # some grow to tens of megabytes while texts are written by them
MAX_USES = 128  # of one grammar: its rows share what its lexer may spend
_BLANKS = r" |\n {0,16}"  # a space, or a line's indentation; free, a model that has lost its way writes them for ever

FIELD = "constraint"  # of the protocol
SERVER_KEY = "x-guidance"  # of a schema: options of llguidance, which are the server's

Allowed = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class _Backend:
    """What all grammars of an engine share."""

    tokenizer: LLTokenizer
    executor: LLExecutor | None


class Matcher:
    """The state of one row in its grammar. Belongs to the engine's thread."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.grammar = grammar
        self.state = grammar.start.deep_copy()

    def advance(self, token_id: int) -> None:
        self.state.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Whether the text obeys the grammar and nothing may follow it."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot be followed any further, or None: some outgrow what may be spent on them."""
        if not self.state.is_error():
            return None
        return f"constraint cannot be followed any further ({_reason(self.state)}): make it simpler"


@dataclass(slots=True, eq=False, weakref_slot=True)
class CompiledGrammar:
    """A constraint, ready for any number of rows. They share what the lexer has learnt, and what it may spend: where
    one has `failed`, those that begin thereafter may fail too."""

    backend: _Backend
    start: LLMatcher
    failed: bool = False


class GrammarCompiler:
    """Compiles constraints for one tokenizer; `eos_ids` are the tokens that end a text. May be used by any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._backend: _Backend | None = None
        self._making = threading.Lock()

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """May take a second. Raises RequestError if the constraint cannot be compiled, llguidance is not installed, or
        it does not support this kind of tokenizer."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RequestError(
                "constraint needs a package that this server lacks: pip install 'trimtab[schema]'", param=FIELD
            ) from error
        _check_size(constraint)
        backend = self._shared()
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        try:
            definition = _definition(constraint)
        except ValueError as error:
            raise RequestError(
                f"constraint cannot be compiled: {first_line(error)[:MAX_REASON]}", param=FIELD
            ) from error
        state = LLMatcher(backend.tokenizer, definition, log_level=0, limits=limits)
        reject(state.is_error(), f"constraint cannot be compiled: {_reason(state)}", FIELD)
        if constraint.kind == "lark":
            self._check_grammar(constraint)
        return CompiledGrammar(backend, state)

    def _check_grammar(self, constraint: Constraint) -> None:
        """Refuse what llguidance reads but leaves to others to do, and an end before the end."""
        ignored = [name for name in sorted(attributes(constraint.text)) if name in NOT_CARRIED_OUT]
        listed = "; ".join(f"{name} ({NOT_CARRIED_OUT[name]})" for name in ignored)
        reject(bool(ignored), f"constraint has rule attributes that are not supported: {listed}", FIELD)
        endings = [(one, str(self._tokenizer.convert_ids_to_tokens(one))) for one in self._eos_ids]
        for special in sorted(special_tokens(constraint.text)):
            ends = any(stands_for(special, *ending) for ending in endings)
            reject(
                ends,
                f"constraint names {special}, which ends every text: a text ends with its grammar by itself",
                FIELD,
            )

    def _shared(self) -> _Backend:
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        with self._making:
            if self._backend is not None:
                return self._backend
            known = sorted(one for one in self._eos_ids if one < len(self._tokenizer))
            reject(not known, "constraint cannot be used: this model has no end-of-sequence token", FIELD)
            try:
                executor = LLExecutor() if (os.cpu_count() or 1) >= MIN_CORES_FOR_THREADS else None
                self._backend = _Backend(from_tokenizer(self._tokenizer, eos_token=known), executor)
            except ValueError as error:
                reason = f"constraint cannot be used with this model's tokenizer: {first_line(error)}"
                raise RequestError(reason, param=FIELD) from error
            return self._backend


def allowed_tokens(matchers: Sequence[Matcher], vocab_size: int) -> Allowed:
    """Which tokens each row may take next, `[rows, vocab_size]`; rows are shared among threads where cores are many.

    Ids beyond the tokenizer's vocabulary are never allowed. A row with a `problem` is allowed nothing.
    """
    backend = matchers[0].grammar.backend
    states = [one.state for one in matchers]
    bits = _masks(backend, states)
    known = min(vocab_size, backend.tokenizer.vocab_size)
    allowed = np.zeros((len(matchers), vocab_size), dtype=np.bool_)
    allowed[:, :known] = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :known]
    for row, one in enumerate(matchers):
        if one.state.is_error():  # its mask would end the text, as if it were whole
            allowed[row] = False
            one.grammar.failed = True
    return allowed


def _masks(backend: _Backend, states: Sequence[LLMatcher]) -> NDArray[np.int32]:
    """A bit for each token of the tokenizer, `[rows, vocabulary / 32]`."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

    bits = allocate_token_bitmask(len(states), backend.tokenizer.vocab_size)
    if backend.executor is not None and len(states) > 1:
        fill_next_token_bitmask_par(backend.executor, [(state, row) for row, state in enumerate(states)], bits)
    else:
        for row, state in enumerate(states):
            fill_next_token_bitmask(state, bits, row)
    return bits


def _check_size(constraint: Constraint) -> None:
    """Refuse what the compiler, or the lexer of a running text, would recurse into too deeply, and options that are not
    a client's."""
    given: list[Any] = []
    try:
        if constraint.kind == "lark":
            count = count_rules(constraint.text)
            reject(count > MAX_RULES, f"constraint has {count} rules; at most {MAX_RULES} are taken", FIELD)
            given = schemas(constraint.text)
        elif constraint.kind == "json":
            given = [json.loads(constraint.text)]
    except (ValueError, RecursionError) as error:
        raise RequestError(f"constraint cannot be read: {first_line(error)[:MAX_REASON]}", param=FIELD) from error
    for schema in given:
        taken = isinstance(schema, dict) and SERVER_KEY in schema
        reject(taken, f"constraint has {SERVER_KEY}, which only the server may set: leave it out", FIELD)


def _definition(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "json":
        return LLMatcher.grammar_from_json_schema(constraint.text, defaults={"whitespace_pattern": _BLANKS})
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(constraint.text))))
    return LLMatcher.grammar_from_lark(constraint.text)


def _reason(state: LLMatcher) -> str:
    """What llguidance says, on one line of bounded length."""
    reason = " ".join(state.get_error().removesuffix("<non-verbose/>").split())
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …"


@dataclass(slots=True, eq=False)
class _Entry:
    """A constraint that was asked for."""

    future: Future[CompiledGrammar]
    began: list[float]  # when, once a thread has it
    uses: int = 0
    overdue: bool = False

    @property
    def spent(self) -> bool:
        """Whether it must be compiled anew."""
        if self.overdue:
            return True
        if not self.future.done():
            return False
        failed = self.future.cancelled() or self.future.exception() is not None
        return failed or self.uses >= MAX_USES or self.future.result().failed


class Grammars:
    """The compiled grammars of one engine. Methods may be called from the event loop only."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = DaemonPool(THREADS, "trimtab-grammars", stack_bytes=STACK_BYTES)
        self._spare = MAX_SPARE_THREADS
        self._live: WeakSet[CompiledGrammar] = WeakSet()
        self._entries: dict[Constraint, _Entry] = {}  # the latest last
        self._closed = False

    async def get(self, constraint: Constraint) -> CompiledGrammar:
        """The compiled grammar of a constraint. Raises RequestError as the compiler does and if it takes too long,
        Overloaded if too many constraints wait or are in use, Unavailable once this is closed."""
        entry = self._entries.pop(constraint, None)
        if entry is None or entry.spent:
            entry = self._begin(constraint)
        self._entries[constraint] = entry
        entry.uses += 1
        answer = asyncio.wrap_future(entry.future)
        answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # not to be logged if nobody waits
        try:
            while not answer.done() and not entry.overdue:  # shielded, because another may wait for the same
                await asyncio.wait((answer,), timeout=COMPILE_SECONDS / 4)
                self._look_at(entry)
            if not answer.done():
                message = f"constraint takes longer than {COMPILE_SECONDS:g} s to compile: make it simpler"
                raise RequestError(message, param=FIELD)
            grammar = answer.result()
        except asyncio.CancelledError:
            if entry.future.cancelled():
                raise Unavailable(CLOSED) from None
            raise
        self._live.add(grammar)
        return grammar

    def close(self) -> None:
        """Compile nothing more; what is being compiled is finished."""
        self._closed = True
        self._threads.close()

    def _look_at(self, entry: _Entry) -> None:
        """Give up a grammar that takes too long, and start a thread in place of the one that has it."""
        if entry.overdue or entry.future.done() or not entry.began:
            return
        if time.monotonic() - entry.began[0] > COMPILE_SECONDS:
            entry.overdue = True
            if self._spare:
                self._spare -= 1
                self._threads.add_thread()

    def _begin(self, constraint: Constraint) -> _Entry:
        if self._closed:
            raise Unavailable(CLOSED)
        self._entries = {one: entry for one, entry in self._entries.items() if not entry.spent}
        finished = [one for one, entry in self._entries.items() if entry.future.done()]
        waiting = len(self._entries) - len(finished)
        if waiting >= MAX_UNFINISHED:
            raise Overloaded(f"{waiting} constraints are being compiled or wait for it: try again later")
        if len(self._live) >= MAX_LIVE_GRAMMARS + len(finished):
            raise Overloaded(f"{len(self._live)} constraints are in use: try again later")
        for one in finished[: max(0, len(finished) - MAX_CACHED_GRAMMARS + 1)]:
            del self._entries[one]
        began: list[float] = []

        def work() -> CompiledGrammar:
            began.append(time.monotonic())
            return self._compiler.compile(constraint)

        return _Entry(self._threads.submit(work), began)
