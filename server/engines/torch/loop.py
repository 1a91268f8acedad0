"""What the engine's thread does in each step, for all live requests.

A step admits waiting requests, computes one chunk of each unfinished prompt and one token of each decoding row, draws
the next tokens and sends their text. An error in the part of one request ends that request. An error in what all share
ends those that run.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from server.engines.mailbox import Outbox
from server.engines.protocol import Delta, Event, Finished, FinishReason, PromptLogprobs, SteeringChange, TokenLogprob
from server.engines.torch.plans import ResolvedPlan
from server.engines.torch.sampling.sample import NonFiniteLogits, sample
from server.engines.torch.scheduling.budget import PrefillBudget
from server.engines.torch.scheduling.request_state import Chunk, RequestState
from server.engines.torch.scheduling.scheduler import Scheduler
from server.engines.torch.token_details import TokenDetails, decide_gates, score_prompt, token_details
from steering_vectors.errors import SteeringError
from steering_vectors.models.transfers import picked
from steering_vectors.runtime.runner import Output, Residuals, RowInput, Runner
from steering_vectors.steering.bank import SteeringBank

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

RUST_PANIC = "PanicException"  # of tokenizers and llguidance; it is no Exception
NOT_FINITE = "the model's logits are not finite; the strength may be too high"


class EngineLoop:
    """The steps of one runner. `ended` is called with each request that ends, `beat` before each forward pass; events
    go into `outbox`. While `damaged`, the buffers of slots may hold anything, and `rebuild` must come before the next
    step."""

    def __init__(
        self,
        runner: Runner,
        bank: SteeringBank,
        scheduler: Scheduler,
        budget: PrefillBudget,
        *,
        eos_ids: frozenset[int],
        ended: Callable[[RequestState], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._bank = bank
        self._scheduler = scheduler
        self._budget = budget
        self._eos_ids = eos_ids
        self._ended = ended
        self._beat = beat
        self._next_deadline = math.inf  # no request has an earlier one
        self.damaged = False
        self.outbox = Outbox()
        self.counts: Counter[str] = Counter()  # by field of EngineStats
        self.finished: Counter[str] = Counter()

    def add(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self._scheduler.add(state)
            self._next_deadline = min(self._next_deadline, state.deadline)

    def cancel(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self.finish(state, "cancelled")

    def end(self, reason: FinishReason, error: str | None = None, *, running_only: bool = False) -> None:
        """End all requests, or only those that have a slot."""
        waiting = () if running_only else tuple(self._scheduler.waiting)
        for state in (*self._scheduler.running, *waiting):
            self.finish(state, reason, error)

    def step(self) -> None:
        self.counts["steps"] += 1
        if time.perf_counter() >= self._next_deadline:
            self._end_overdue()
        for state in self._scheduler.admit():
            state.admitted = time.perf_counter()
            self._write(state)
        for state in tuple(self._scheduler.running):
            try:
                if state.steering.advance(state.completion_length):
                    self._write(state)
            except BaseException as error:
                self._fail_alone(state, error, "changing its steering")
        for batch in self._scheduler.schedule():
            self._beat()
            self._run(batch)

    def _end_overdue(self) -> None:
        """End requests whose time is over."""
        now = time.perf_counter()
        states = (*self._scheduler.running, *self._scheduler.waiting)
        for state in states:
            if state.deadline <= now:
                self.finish(state, "timeout", _progress(state))
        self._next_deadline = min((state.deadline for state in states if state.deadline > now), default=math.inf)

    def fail_step(self, error: Exception) -> None:
        """End what runs after a step that failed."""
        logger.error("a step failed", exc_info=error)
        self.damaged = True
        self.end("error", _step_message(error), running_only=True)

    def rebuild(self) -> None:
        """Clear all slots, and reuse nothing of what they held. Ends what still runs. Raises what the buffers raise,
        and then nothing can be computed any more."""
        self.end("error", "the engine was reset after an error", running_only=True)
        self._scheduler.forget_prefixes()
        for slot in range(self._scheduler.num_slots):
            self._bank.clear(slot)
            self._runner.zero_slot(slot)
        self.damaged = False

    def steer(self, state: RequestState, plan: ResolvedPlan) -> SteeringChange:
        """Change the plan of a request from its next token on."""
        token = state.completion_length
        segment = state.steering.change(token, plan)
        if state.slot >= 0:
            self._write(state)
        return SteeringChange(state.id, token, state.computed, segment)

    def finish(
        self,
        state: RequestState,
        reason: FinishReason,
        error: str | None = None,
        *,
        matched: str | int | None = None,
        ending: tuple[TokenLogprob, ...] = (),
        error_param: str | None = None,
    ) -> None:
        """End a request with its one terminal event, and free its slots. Raises nothing: what cannot be done for the
        request is logged, and what cannot be done to a slot makes the loop `damaged`."""
        if state.finish is not None:
            return
        state.finish = reason
        rest = self._try(state, lambda: state.detokenizer.finish(stops=self._stops_count(state)))
        if rest is None and reason in ("stop", "length"):
            reason, error, error_param = "error", f"the end of the text of {state.id} could not be decoded", None
        elif state.detokenizer.matched_stop is not None and reason in ("stop", "length"):
            reason, matched = "stop", state.detokenizer.matched_stop
        state.finish = reason
        keep = reason in ("stop", "length") or (reason in ("cancelled", "timeout") and state.completion_length > 0)
        for slot in state.slots:
            try:
                self._bank.clear(slot)
                if keep:
                    self._runner.release(slot)
                else:
                    self._runner.zero_slot(slot)
            except BaseException:
                logger.exception("slot %d could not be cleared", slot)
                self.damaged = True
        self._try(state, lambda: self._scheduler.remove(state, keep=keep))
        self._try(state, lambda: self._ended(state))
        self.counts["cached_tokens"] += state.cached
        self.finished[reason] += 1
        if rest:
            self._send(state, Delta(state.id, rest, ()))
        self._send(
            state,
            Finished(
                state.id,
                reason,
                prompt_tokens=state.prompt_length,
                completion_tokens=state.completion_length,
                cached_tokens=state.cached,
                steered_tokens=state.steering.steered_tokens,
                error=error,
                error_param=error_param,
                matched_stop=matched,
                segments=self._try(state, lambda: state.steering.segments) or (),
                gates=dict(state.steering.gates),
                ending=ending,
                times=state.times(),
            ),
        )

    def _try(self, state: RequestState, part: Callable[[], Value]) -> Value | None:
        """Do a part of ending a request; None if it raises."""
        try:
            return part()
        except BaseException:
            logger.exception("a part of ending %s failed", state.id)
            return None

    def _fail_alone(self, state: RequestState, error: BaseException, doing: str) -> None:
        """End one request whose own part of a step raised. Raises what is no error of a request."""
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise error
        logger.error("%s failed while %s", state.id, doing, exc_info=error)
        self.finish(state, "error", f"{type(error).__name__} while {doing}: the server's log names {state.id}")

    def _run(self, batch: list[Chunk]) -> None:
        """One forward pass, and what follows from it."""
        began = time.perf_counter()
        batch = [chunk for chunk in batch if chunk.state.finish is None]
        if not batch:
            return
        output, scored = run_batch(self._runner, batch)
        if scored:
            self._score(batch, scored)
        self._advance(batch, output)
        seconds, tokens = time.perf_counter() - began, sum(map(len, batch))
        if tokens == len(batch):
            self._budget.note_decoding(seconds)
        else:
            self._budget.note_prompts(tokens, seconds)

    def _score(self, batch: Sequence[Chunk], scored: Sequence[torch.Tensor]) -> None:
        """Note the log-probabilities of prompt tokens, and send them when the prompt is complete."""
        for chunk, logits in zip(batch, scored, strict=True):
            state = chunk.state
            try:
                # one row at a time: logits that fit the caches are read twice for the price of once
                new = score_prompt(state, chunk.scored_from, logits)
            except BaseException as error:
                self._fail_alone(state, error, "scoring its prompt")
                continue
            if any(math.isnan(one.logprob) for one in new):
                self._fail(state)
            elif chunk.end == state.prompt_length:
                self._send(state, PromptLogprobs(state.id, tuple(state.prompt_scores)))
                state.prompt_scores = []

    def _advance(self, batch: Sequence[Chunk], output: Output[torch.Tensor]) -> None:
        """Continue from the logits of each chunk's last token."""
        for chunk in batch:
            state = chunk.state
            if state.finish is not None:
                continue
            self.counts["prompt_tokens"] += max(0, min(chunk.end, state.prompt_length) - chunk.start)
            self.counts["steered_tokens"] += chunk.steered_positions
            self._scheduler.advance(chunk)
            try:
                if state.steering.undecided and decide_gates(state, output.sums[chunk.slot]):
                    self._write(state)
            except BaseException as error:
                self._fail_alone(state, error, "deciding its gates")
                continue
            if chunk.samples and state.request.sampling.max_tokens == 0:
                self.finish(state, "length")
        drawing = [place for place, chunk in enumerate(batch) if chunk.samples and chunk.state.finish is None]
        if drawing:
            logits = output.logits if len(drawing) == len(batch) else picked(output.logits, drawing)
            self._draw([batch[place].state for place in drawing], logits, output.residuals)

    def _draw(self, states: list[RequestState], logits: torch.Tensor, residuals: Mapping[int, Residuals]) -> None:
        try:
            tokens = sample(logits, [state.sampler for state in states])
        except NonFiniteLogits as failure:
            for place in failure.rows:
                self._fail(states[place])
            finite = [place for place in range(len(states)) if place not in failure.rows]
            if finite:
                self._draw([states[place] for place in finite], picked(logits, finite), residuals)
            return
        except BaseException as error:
            if len(states) == 1:
                self._fail_alone(states[0], error, "drawing its next token")
                return
            for place, state in enumerate(states):  # none was drawn: each alone, so that only the one that raises ends
                self._draw([state], logits[place : place + 1], residuals)
            return
        self._accept_all(states, logits, tokens, residuals)

    def _accept_all(
        self,
        states: Sequence[RequestState],
        logits: torch.Tensor,
        tokens: Sequence[int],
        residuals: Mapping[int, Residuals],
    ) -> None:
        try:
            every = token_details(states, logits, tokens, residuals)
        except BaseException as error:
            if len(states) == 1:
                self._fail_alone(states[0], error, "reading the details of its token")
                return
            for place, state in enumerate(states):
                self._accept_all([state], logits[place : place + 1], tokens[place : place + 1], residuals)
            return
        for state, token, details in zip(states, tokens, every, strict=True):
            try:
                self._accept(state, token, details)
            except BaseException as error:
                self._fail_alone(state, error, "adding its next token")

    def _accept(self, state: RequestState, token: int, details: TokenDetails) -> None:
        """Append a drawn token, send its text, and end the request if it was the last."""
        sampling = state.request.sampling
        state.ids.append(token)
        state.sampler.observe(token)
        self.counts["generated_tokens"] += 1
        if state.first_token is None:
            state.first_token = time.perf_counter()
        if token in state.stop_ids:
            self.finish(state, "stop", matched=state.stop_ids[token], ending=details.logprobs)
        elif token in self._eos_ids and not sampling.ignore_eos:
            self.finish(state, "stop", ending=details.logprobs)
        else:
            text = state.detokenizer.push([token], stops=self._stops_count(state))
            self._send(
                state, Delta(state.id, text, (token,), details.logprobs, details.divergences, details.projections)
            )
            if state.detokenizer.matched_stop is not None:
                self.finish(state, "stop", matched=state.detokenizer.matched_stop)
            elif state.sampler.complete:
                self.finish(state, "stop")
            elif state.completion_length == sampling.max_tokens or len(state.ids) >= self._runner.context:
                self.finish(state, "length")

    def _fail(self, state: RequestState) -> None:
        """End a request whose logits are not finite, or whose constraint allows nothing."""
        if state.sampler.problem is not None:
            self.finish(state, "error", state.sampler.problem, error_param="constraint")
        else:
            self.counts["nonfinite_rows"] += 1
            terms = state.steering.plan.plan.terms
            steered = state.steering.steered_tokens or any(term.acts for term in terms)
            self.finish(state, "error", NOT_FINITE, error_param="strength" if steered else None)

    def _write(self, state: RequestState) -> None:
        """Give the request's row of the bank what steers it now."""
        try:
            self._bank.write(state.slot, state.steering.mixture)
        except SteeringError as error:
            self.finish(state, "error", error.message, error_param=error.param)
        except BaseException as error:
            self._fail_alone(state, error, "steering it")

    def _stops_count(self, state: RequestState) -> bool:
        """Whether a stop string ends the text: not before `min_tokens` are written."""
        return state.completion_length > state.request.sampling.min_tokens

    def _send(self, state: RequestState, event: Event) -> None:
        if state.mailbox is not None:
            self.outbox.put(state.mailbox, event)


def _step_message(error: Exception) -> str:
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    if out_of_memory:
        return "the server ran out of memory: send shorter or fewer requests, or try again later"
    return f"{type(error).__name__} while computing a step"


def _progress(state: RequestState) -> str:
    """How far a request came, for its client."""
    if state.slot < 0:
        return "it still waited for a slot"
    if not state.completion_length:
        return "its prompt was still being computed"
    return f"{state.completion_length} tokens were generated"


def run_batch(runner: Runner, batch: Sequence[Chunk]) -> tuple[Output[torch.Tensor], Sequence[torch.Tensor]]:
    """One forward pass: the output for each chunk's last token and, where the batch scores, each chunk's logits from
    the first scored token on, `[tokens, vocabulary]`. Those of the unsteered slots are left with their requests."""
    rows = [
        RowInput(
            chunk.slot, chunk.ids, chunk.start, chunk.state.steering.steered_from, max(1, chunk.end - chunk.scored_from)
        )
        for chunk in batch
    ]
    compared = [chunk for chunk in batch if chunk.state.unsteered_slot is not None]
    if compared:
        rows += [RowInput(chunk.state.unsteered_slot or 0, chunk.ids, chunk.start) for chunk in compared]
        rows.sort(key=lambda row: row.slot)
    places = {row.slot: place for place, row in enumerate(rows)}
    read = layers_to_read(batch)
    if batch[0].scores:
        every = runner.forward_all(rows, read)
        scored = [every.logits[places[chunk.slot]] for chunk in batch]
        return Output(torch.stack([one[-1] for one in scored]), every.residuals, every.sums), scored
    output = runner.forward(rows, read)
    for chunk in compared:
        chunk.state.unsteered_logits = output.logits[places[chunk.state.unsteered_slot or 0]]
    if compared:
        output = replace(output, logits=picked(output.logits, [places[chunk.slot] for chunk in batch]))
    return output, ()


def layers_to_read(batch: Sequence[Chunk]) -> list[int]:
    """The blocks whose output is projected before the next tokens are drawn, or decides a gate."""
    projected = {
        layer for chunk in batch if chunk.samples for profile in chunk.state.projected for layer in profile.layers
    }
    return sorted(projected.union(gate.layer for chunk in batch for gate in chunk.state.steering.undecided.values()))
