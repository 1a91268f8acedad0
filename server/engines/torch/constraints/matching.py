"""What a row may write: grammars compiled by llguidance, and where each row stands in its own.

Owns compiling, the tokenizer that this needs (made once, when the first constraint arrives), the state of each row and
the tokens that a batch of rows may take next. The text ends where the grammar lets it end: end-of-sequence tokens are
among the allowed ones there, and a row whose grammar admits nothing more is complete. Knows nothing of HTTP, of logits
or of how a token is drawn among the allowed ones. llguidance is an optional package: nothing here needs it before a
constraint is compiled.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from server.engines.errors import reject
from server.engines.protocol import Constraint, Grammar
from server.engines.torch.constraints.lark import NOT_CARRIED_OUT, attributes, special_tokens, stands_for
from steering_vectors.errors import RequestError, first_line

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_MOST_STATES = 50_000  # of a lexer, which has a kilobyte or two for each
_MANY_CORES = 4  # with fewer, handing work to another thread costs more than it saves
_LONGEST_REASON = 500  # characters
_BLANKS = r" |\n {0,16}"  # a space, or a line's indentation; free, a model that has lost its way writes them for ever

Allowed = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class _Backend:
    """What all grammars of an engine share."""

    tokenizer: LLTokenizer
    executor: LLExecutor | None


class Matcher:
    """Where one row stands in its grammar. Belongs to the engine's thread."""

    __slots__ = ("grammar", "state")

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.grammar = grammar
        self.state = grammar.start.deep_copy()

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
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
        return (
            f"{self.grammar.constraint.field} cannot be followed any further ({_reason(self.state)}): make it simpler"
        )


@dataclass(slots=True, eq=False)
class CompiledGrammar:
    """A constraint, ready for any number of rows. They share what the lexer has learnt, and what it may spend: where
    one has `failed`, those that begin thereafter may fail too."""

    constraint: Constraint
    backend: _Backend
    start: LLMatcher
    failed: bool = False

    def matcher(self) -> Matcher:
        """A row's own, at the start of its text."""
        return Matcher(self)


class GrammarCompiler:
    """Compiles constraints for one tokenizer; `eos_ids` are the tokens that end a text. May be used by any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._backend: _Backend | None = None
        self._making = threading.Lock()

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """May take a second. Raises RequestError, which names the constraint's field, if it cannot be compiled, or
        llguidance is not installed, or it does not know this kind of tokenizer."""
        field = constraint.field
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RequestError(
                f"{field} needs a package that this server lacks: pip install 'trimtab[schema]'", param=field
            ) from error
        backend = self._shared(field)
        limits = LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        state = LLMatcher(backend.tokenizer, _definition(constraint), log_level=0, limits=limits)
        reject(state.is_error(), f"{field} cannot be compiled: {_reason(state)}", field)
        if constraint.kind == "lark":
            self._check_grammar(constraint)
        return CompiledGrammar(constraint, backend, state)

    def _check_grammar(self, constraint: Constraint) -> None:
        """Refuse what llguidance reads but leaves to others to do, and an end before the end."""
        field = constraint.field
        ignored = [name for name in sorted(attributes(constraint.text)) if name in NOT_CARRIED_OUT]
        told = "; ".join(f"{name} ({NOT_CARRIED_OUT[name]})" for name in ignored)
        reject(bool(ignored), f"{field} has rule attributes that are not supported: {told}", field)
        endings = [(one, str(self._tokenizer.convert_ids_to_tokens(one))) for one in self._eos_ids]
        for special in sorted(special_tokens(constraint.text)):
            ends = any(stands_for(special, *ending) for ending in endings)
            reject(
                ends, f"{field} names {special}, which ends every text: a text ends with its grammar by itself", field
            )

    def _shared(self, field: str) -> _Backend:
        with self._making:
            if self._backend is None:
                self._backend = self._make(field)
            return self._backend

    def _make(self, field: str) -> _Backend:
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        known = sorted(one for one in self._eos_ids if one < len(self._tokenizer))
        reject(not known, f"{field} cannot be used: this model has no end-of-sequence token", field)
        try:
            executor = LLExecutor() if (os.cpu_count() or 1) >= _MANY_CORES else None
            return _Backend(from_tokenizer(self._tokenizer, eos_token=known), executor)
        except ValueError as error:
            raise RequestError(
                f"{field} cannot be used with this model's tokenizer: {first_line(error)}", param=field
            ) from error


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


def _definition(constraint: Constraint) -> str:
    """The constraint as llguidance writes grammars."""
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
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} …"


def matcher_of(grammar: Grammar | None) -> Matcher | None:
    """A matcher of its own for one row; None without a grammar."""
    if grammar is None:
        return None
    assert isinstance(grammar, CompiledGrammar), "a grammar of another engine"
    return grammar.matcher()
