"""What the engine's thread does step by step, for all rows that live.

A step admits what waits, computes one chunk of each unfinished prompt and one token of each decoding row, draws the
next tokens and sends their text. Owns the rows' lives from their first step to their last event; what rows compute is
the runner's, which rows run is the scheduler's, what a token becomes is the sampler's and the detokenizer's. Knows
nothing of threads or of those who asked.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import torch

from server.engines.protocol import Delta, Finished, FinishReason, PromptLogprobs, SteeringChange, TokenLogprob
from server.engines.torch.batches import Passes
from server.engines.torch.mailbox import Outbox
from server.engines.torch.request import Row, Told, score, tell
from server.engines.torch.sampling.sample import NonFiniteLogits, sample
from server.engines.torch.scheduling.budget import Pace
from server.engines.torch.scheduling.request_state import Chunk, Sequence
from server.engines.torch.scheduling.scheduler import Scheduler
from steering_vectors.models.transfers import picked
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.runtime.runner import Runner
from steering_vectors.steering.bank import SteeringBank

NOT_FINITE = "the model's logits are not finite; the strength may be too high"


class Steps:
    """The rows of one runner. `ended` is called with the id of each request that ends; events go into `outbox`."""

    def __init__(
        self,
        runner: Runner,
        bank: SteeringBank,
        scheduler: Scheduler,
        pace: Pace,
        *,
        eos_ids: frozenset[int],
        ended: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._bank = bank
        self._scheduler = scheduler
        self._pace = pace
        self._eos_ids = eos_ids
        self._ended = ended
        self._passes = Passes(runner)
        self._rows: dict[str, Row] = {}
        self.outbox = Outbox()
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        self._rows[row.sequence.request.id] = row
        self._scheduler.add(row.sequence)

    def row(self, request_id: str) -> Row | None:
        return self._rows.get(request_id)

    def end(self, reason: FinishReason, error: str | None = None, *, running_only: bool = False) -> None:
        """End all rows, or those only that have a slot."""
        for row in list(self._rows.values()):
            if row.sequence.slot >= 0 or not running_only:
                self.finish(row, reason, error)

    def step(self) -> None:
        """Admit what waits, then the passes over prompts and one over decoding rows."""
        self.counts["steps"] += 1
        for sequence in self._scheduler.admit():
            self._bank.write(sequence.slot, sequence.mixture)
        for sequence in self._scheduler.running_sequences():
            if sequence.scheduled and (due := sequence.take_scheduled()) is not None:
                self.steer(sequence, due)
        for batch in self._scheduler.schedule():
            began = time.perf_counter()
            self._compute(batch, self._score(batch) if batch[0].scores else self._forward(batch))
            self._learn(batch, time.perf_counter() - began)

    def _learn(self, batch: list[Chunk], seconds: float) -> None:
        tokens = sum(map(len, batch))
        if tokens == len(batch):
            self._pace.note_decoding(seconds)
        else:
            self._pace.note_prompts(tokens, seconds)

    def _forward(self, batch: list[Chunk]) -> torch.Tensor:
        """The logits of each chunk's last token; those of its shadow are left with its row."""
        logits, shadows = self._passes.forward(batch)
        for request_id, unsteered in shadows.items():
            self._rows[request_id].unsteered = unsteered
        return logits

    def _score(self, batch: list[Chunk]) -> torch.Tensor:
        """Note the log-probabilities of prompts' tokens; the logits of each chunk's last token."""
        found = self._passes.forward_all(batch)
        rows = [self._row(chunk) for chunk in batch]
        told = score(rows, [chunk.scored_from for chunk in batch], found)
        for chunk, row, scores in zip(batch, rows, told, strict=True):
            if any(math.isnan(one.logprob) for one in scores):
                self.finish(row, "error", NOT_FINITE, blamed=row.blamed)
            elif chunk.end == chunk.sequence.prompt_length:
                self.outbox.put(row.mailbox, PromptLogprobs(tuple(row.scores)))
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
                self.finish(self._row(chunk), "length")
        drawing = [index for index, chunk in enumerate(batch) if chunk.samples and chunk.sequence.finish is None]
        if drawing:
            logits = logits if len(drawing) == len(batch) else picked(logits, drawing)
            self._draw([self._row(batch[index]) for index in drawing], logits)

    def _draw(self, rows: list[Row], logits: torch.Tensor) -> None:
        try:
            tokens = sample(logits, [row.sampler for row in rows])
        except NonFiniteLogits as failure:
            for row in (rows[index] for index in failure.rows):
                self.finish(row, "error", row.sampler.problem or NOT_FINITE, blamed=row.blamed)
            sound = [index for index in range(len(rows)) if index not in failure.rows]
            if sound:
                self._draw([rows[index] for index in sound], picked(logits, sound))
            return
        residuals = self._passes.residuals()
        for row, token, told in zip(rows, tokens, tell(rows, logits, tokens, residuals), strict=True):
            self._accept(row, token, told)

    def _accept(self, row: Row, token: int, told: Told) -> None:
        """Append a drawn token to its row, send its text, end the row if it was the last."""
        sequence, sampling = row.sequence, row.sequence.request.sampling
        sequence.ids.append(token)
        row.sampler.observe(token)
        self.counts["generated"] += 1
        if token in sampling.stop_token_ids:
            self.finish(row, "stop", matched=token, ending=told.logprobs)
        elif token in self._eos_ids and not sampling.ignore_eos:
            self.finish(row, "stop", ending=told.logprobs)
        else:
            text = row.detokenizer.push([token])
            self.outbox.put(row.mailbox, Delta(text, (token,), told.logprobs, told.divergences, told.projections))
            if row.detokenizer.matched_stop is not None:
                self.finish(row, "stop", matched=row.detokenizer.matched_stop)
            elif row.sampler.complete:
                self.finish(row, "stop")
            elif sequence.completion_length == sampling.max_tokens or len(sequence.ids) >= self._runner.context:
                self.finish(row, "length")

    def finish(
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
                self._runner.zero_slot(slot)
        self._scheduler.remove(sequence, sound=sound)
        del self._rows[sequence.request.id]
        self._ended(sequence.request.id)
        self.counts["cached"] += sequence.cached
        self.finished[reason] += 1
        if rest:
            self.outbox.put(row.mailbox, Delta(rest, ()))
        self.outbox.put(
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

    def steer(self, sequence: Sequence, mixture: Mixture) -> SteeringChange:
        first = sequence.steer(mixture)
        if sequence.slot >= 0:
            self._bank.write(sequence.slot, sequence.mixture)
        return SteeringChange(first, sequence.computed)

    def _row(self, chunk: Chunk) -> Row:
        return self._rows[chunk.sequence.request.id]

    def _count(self, chunk: Chunk) -> None:
        prompt = chunk.sequence.prompt_length
        self.counts["prompt"] += max(0, min(chunk.end, prompt) - chunk.start)
        self.counts["steered"] += chunk.steered_positions
