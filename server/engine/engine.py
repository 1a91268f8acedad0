"""The engine on plain transformers: one thread owns the model and runs step after step.

A step admits what waits, computes one chunk of each unfinished prompt and one token of each decoding row, draws the
next tokens and sends their text. Owns time and the rows' lives; what rows compute is the runner's, which rows run is
the scheduler's, what a token becomes is the sampler's and the detokenizer's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import torch

from server.engine.admission import (
    check_gates,
    check_no_new_gates,
    check_options,
    check_prompt,
    checked_context,
    eos_ids,
)
from server.engine.constraints import CompiledGrammar, GrammarCompiler, matcher_of
from server.engine.detokenizer import Detokenizer
from server.engine.grammars import Grammars
from server.engine.mailbox import Mailbox, Outbox
from server.engine.passes import Passes
from server.engine.prefixes import Prefixes
from server.engine.protocol import (
    Constraint,
    Delta,
    EngineStats,
    EventStream,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    SteeringChange,
    TokenLogprob,
)
from server.engine.row import Row, Told, tell
from server.engine.sampling import NonFiniteLogits, RowSampler, check_vocabulary, sample
from server.engine.scheduler import Scheduler
from server.engine.selection import choose_runner
from server.engine.sequence import Chunk, Sequence
from steering_vectors.errors import (
    Conflict,
    Overloaded,
    Unavailable,
    UnknownGeneration,
)
from steering_vectors.hooks import SteeringBank
from steering_vectors.mixture import Mixture
from steering_vectors.models import LanguageModel
from steering_vectors.profile import Profile

logger = logging.getLogger(__name__)

DEFAULT_SLOTS = 16
DEFAULT_QUEUE = 1024
DEFAULT_CHUNK = 256
REMEMBERED = 4096
NOT_FINITE = "the model's logits are not finite; the strength may be too high"


class TorchEngine:
    """Implements `protocol.Engine`.

    `slots` rows run at once and the rest queue, `max_queue` of them at most. `context` None takes the model's own
    limit, at most 4096; more than the model's limit is a ModelError. `prefill_chunk` is the number of prompt tokens
    computed in one step, for all rows together, while others decode. `prefix_reuse`: whether what is computed of a
    prompt is kept for others that begin alike and are steered alike.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        slots: int = DEFAULT_SLOTS,
        context: int | None = None,
        max_queue: int = DEFAULT_QUEUE,
        prefill_chunk: int = DEFAULT_CHUNK,
        prefix_reuse: bool = True,
        allow_model_mismatch: bool = False,
    ) -> None:
        self._language_model = language_model
        self._context = checked_context(language_model, context)
        self._max_queue = max_queue
        self._allow_model_mismatch = allow_model_mismatch
        self._eos_ids = eos_ids(language_model)
        self._grammars = Grammars(GrammarCompiler(language_model.tokenizer, self._eos_ids))
        self._bank = SteeringBank(
            language_model.blocks,
            rows=slots,
            hidden_size=language_model.hidden_size,
            dtype=language_model.dtype,
            device=language_model.device,
        )
        self._bank.attach()
        self._runner = choose_runner(language_model, self._bank, context=self._context)
        self._passes = Passes(self._runner)
        chunk = prefill_chunk if self._runner.chunked else self._context * slots
        self._prefixes = Prefixes(slots, self._runner.columns if prefix_reuse else None)
        self._scheduler = Scheduler(slots=slots, chunk_tokens=chunk, prefixes=self._prefixes)
        self._rows: dict[str, Row] = {}
        self._live: set[str] = set()
        self._ended: dict[str, None] = {}  # the latest, so that a late change is told from a wrong id
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)
        self._thread.start()

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
                vocab_size=self._language_model.vocab_size,
                eos_ids=self._eos_ids,
                prompt_ids=request.prompt_ids,
                choice=request.choice,
                matcher=matcher_of(request.grammar),
            ),
            detokenizer=Detokenizer(self._language_model.tokenizer, request.prompt_ids, request.sampling.stop),
            mailbox=mailbox,
        )
        self._live.add(request.id)
        self._commands.put(lambda: self._add(row))
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
            steps=self._counts["steps"],
            prompt_tokens=self._counts["prompt"],
            generated_tokens=self._counts["generated"],
            steered_tokens=self._counts["steered"],
            cached_tokens=self._counts["cached"],
            finished=dict(self._finished),
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
        vocabulary, writes = self._language_model.vocab_size, request.sampling.max_tokens != 0
        check_prompt(request.prompt_ids, vocabulary=vocabulary, context=self._context, writes=writes)
        check_vocabulary(request.sampling, self._language_model.vocab_size)
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
        with torch.inference_mode():
            while not self._closing:
                self._take_commands(wait=not self._scheduler.has_work)
                if not self._closing and self._scheduler.has_work:
                    self._step_or_fail()
                self._outbox.deliver()
            self._take_commands(wait=False)
            for row in list(self._rows.values()):
                self._finish(row, "cancelled")
            self._outbox.deliver()

    def _step_or_fail(self) -> None:
        """A step that breaks ends the requests it ran, never the thread."""
        try:
            self.step()
        except Exception as error:
            logger.exception("a step failed")
            for sequence in self._scheduler.running_sequences():
                self._finish(self._rows[sequence.request.id], "error", f"{type(error).__name__} while computing a step")

    def step(self) -> None:
        """Admit what waits, then one pass over prompts and one over decoding rows."""
        self._counts["steps"] += 1
        for sequence in self._scheduler.admit():
            self._bank.write(sequence.slot, sequence.mixture)
        for sequence in self._scheduler.running_sequences():
            if sequence.scheduled and (due := sequence.take_scheduled()) is not None:
                self._steer(sequence, due)
        for batch in self._scheduler.schedule():
            for scores in (True, False):
                if part := [chunk for chunk in batch if chunk.scores is scores]:
                    self._compute(part, self._score(part) if scores else self._forward(part))

    def _forward(self, batch: list[Chunk]) -> torch.Tensor:
        """The logits of each chunk's last token; those of its shadow are left with its row."""
        logits, shadows = self._passes.forward(batch)
        for request_id, unsteered in shadows.items():
            self._rows[request_id].unsteered = unsteered
        return logits

    def _score(self, batch: list[Chunk]) -> torch.Tensor:
        """Note the log-probabilities of prompts' tokens; the logits of each chunk's last token."""
        found = self._passes.forward_all(batch)
        for chunk, logits in zip(batch, found, strict=True):
            row = self._row(chunk)
            if any(math.isnan(one.logprob) for one in row.score(chunk.scored_from, logits)):
                self._finish(row, "error", NOT_FINITE, blamed=row.blamed)
            elif chunk.end == chunk.sequence.prompt_length:
                self._outbox.put(row.mailbox, PromptLogprobs(tuple(row.scores)))
                row.scores = []
        return torch.stack([logits[-1] for logits in found])

    def _compute(self, batch: list[Chunk], logits: torch.Tensor) -> None:
        """Go on from the logits of each chunk's last token."""
        for chunk in batch:
            if chunk.sequence.finish is not None:
                continue
            self._count(chunk)
            self._scheduler.advance(chunk)
            if chunk.sequence.undecided and self._row(chunk).decide(self._passes.sums(chunk.slot)):
                self._bank.write(chunk.slot, chunk.sequence.mixture)
            if chunk.samples and chunk.sequence.request.sampling.max_tokens == 0:
                self._finish(self._row(chunk), "length")
        drawing = [index for index, chunk in enumerate(batch) if chunk.samples and chunk.sequence.finish is None]
        if drawing:
            logits = logits if len(drawing) == len(batch) else logits[drawing]
            self._draw([self._row(batch[index]) for index in drawing], logits)

    def _draw(self, rows: list[Row], logits: torch.Tensor) -> None:
        try:
            tokens = sample(logits, [row.sampler for row in rows])
        except NonFiniteLogits as failure:
            for row in (rows[index] for index in failure.rows):
                self._finish(row, "error", row.sampler.problem or NOT_FINITE, blamed=row.blamed)
            sound = [index for index in range(len(rows)) if index not in failure.rows]
            if sound:
                self._draw([rows[index] for index in sound], logits[sound])
            return
        residuals = self._passes.residuals()
        for row, token, told in zip(rows, tokens, tell(rows, logits, tokens, residuals), strict=True):
            self._accept(row, token, told)

    def _accept(self, row: Row, token: int, told: Told) -> None:
        """Append a drawn token to its row, send its text, end the row if it was the last."""
        sequence, sampling = row.sequence, row.sequence.request.sampling
        sequence.ids.append(token)
        row.sampler.observe(token)
        self._counts["generated"] += 1
        if token in sampling.stop_token_ids:
            self._finish(row, "stop", matched=token, ending=told.logprobs)
        elif token in self._eos_ids and not sampling.ignore_eos:
            self._finish(row, "stop", ending=told.logprobs)
        else:
            text = row.detokenizer.push([token])
            self._outbox.put(row.mailbox, Delta(text, (token,), told.logprobs, told.divergences, told.projections))
            if row.detokenizer.matched_stop is not None:
                self._finish(row, "stop", matched=row.detokenizer.matched_stop)
            elif row.sampler.complete:
                self._finish(row, "stop")
            elif sequence.completion_length == sampling.max_tokens or len(sequence.ids) >= self._context:
                self._finish(row, "length")

    def _finish(
        self,
        row: Row,
        reason: FinishReason,
        error: str | None = None,
        *,
        matched: str | int | None = None,
        ending: tuple[TokenLogprob, ...] = (),
        blamed: str | None = None,
    ) -> None:
        sequence = row.sequence
        if sequence.finish is not None:
            return
        rest = row.detokenizer.finish()
        if row.detokenizer.matched_stop is not None and reason in ("stop", "length"):
            reason, matched = "stop", row.detokenizer.matched_stop
        sequence.finish = reason
        sound = reason in ("stop", "length") or (reason == "cancelled" and sequence.completion_length > 0)
        for slot in sequence.slots:
            self._bank.clear(slot)
            if sound:
                self._runner.release(slot)
            else:
                self._runner.scrub(slot)
        self._scheduler.remove(sequence, sound=sound)
        self._forget(sequence.request.id)
        self._counts["cached"] += sequence.cached
        self._finished[reason] += 1
        if rest:
            self._outbox.put(row.mailbox, Delta(rest, ()))
        self._outbox.put(
            row.mailbox,
            Finished(
                reason=reason,
                prompt_tokens=sequence.prompt_length,
                completion_tokens=sequence.completion_length,
                cached_tokens=sequence.cached,
                steered_tokens=sequence.steered_tokens,
                error=error,
                matched_stop=matched,
                ending=ending,
                segments=tuple(sequence.segments),
                gates=dict(sequence.gates),
                blamed=blamed,
            ),
        )

    def _add(self, row: Row) -> None:
        self._rows[row.sequence.request.id] = row
        self._scheduler.add(row.sequence)

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

    def _steer(self, sequence: Sequence, mixture: Mixture) -> SteeringChange:
        first = sequence.steer(mixture)
        if sequence.slot >= 0:
            self._bank.write(sequence.slot, sequence.mixture)
        return SteeringChange(first, sequence.computed)

    def _change(self, request_id: str, mixture: Mixture, changed: asyncio.Future[SteeringChange]) -> None:
        """Carry out `set_steering`, and tell the one that waits for it in its own loop."""
        try:
            self._check_live(request_id)
            sequence = self._rows[request_id].sequence
            check_no_new_gates(sequence.conditions, mixture)
            sequence.scheduled.clear()
            change = self._steer(sequence, mixture)
            changed.get_loop().call_soon_threadsafe(_settle, changed, change)
        except Exception as error:
            changed.get_loop().call_soon_threadsafe(_settle, changed, error)

    def _cancel(self, request_id: str) -> None:
        if (row := self._rows.get(request_id)) is not None:
            self._finish(row, "cancelled")

    def _forget(self, request_id: str) -> None:
        self._rows.pop(request_id, None)
        self._live.discard(request_id)
        self._ended[request_id] = None
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _row(self, chunk: Chunk) -> Row:
        return self._rows[chunk.sequence.request.id]

    def _count(self, chunk: Chunk) -> None:
        prompt = chunk.sequence.prompt_length
        self._counts["prompt"] += max(0, min(chunk.end, prompt) - chunk.start)
        self._counts["steered"] += chunk.steered_positions

    def _take_commands(self, *, wait: bool) -> None:
        """Carry out what the event loop asked for since the last step; if there is nothing to do, wait for it."""
        if wait and not self._closing:
            self._commands.get()()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return


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
