"""Which tokens of which sequences run in the next step. No torch: numbers and lists only.

Owns the queue, the slots and each sequence's progress. A sequence takes the lowest free slot and what the slots hold of
its prompt already, the rest is computed in chunks that share a budget of tokens per step, and then it decodes one token
a step; rows join and leave between steps. Knows nothing of models, text or sampling.
"""

from __future__ import annotations

import heapq
from collections import deque

from server.engines.torch.scheduling.budget import Pace
from server.engines.torch.scheduling.prefix_reuse import LEAST, Prefixes, Trace
from server.engines.torch.scheduling.request_state import Chunk, Sequence

UNDISTURBED = 4
PASS = 128  # prompt tokens whose computing costs as much as one more pass, roughly


class Scheduler:
    """Three verbs: `add`, `schedule`, `remove`.

    `chunk_tokens` bounds the prompt tokens computed in one step, and `pace` those in a step in which rows decode. While
    none does, it may be `UNDISTURBED` times as many: then only newcomers wait.
    """

    def __init__(
        self, *, slots: int, chunk_tokens: int, prefixes: Prefixes | None = None, pace: Pace | None = None
    ) -> None:
        self.num_slots = slots
        self._pace = pace or Pace(chunk_tokens)
        self._prefixes = prefixes or Prefixes(slots, None)
        self._chunk_tokens = chunk_tokens
        self._free = list(range(slots))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, Sequence] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free slots to the longest waiting sequences, and tell which were admitted."""
        for sequence in self._running.values():
            if sequence.leader is not None and not sequence.is_following:
                self._begin(sequence)
        admitted = []
        while self._waiting and len(self._free) >= 1 + self._waiting[0].request.divergence:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            if sequence.request.divergence:
                sequence.shadow = heapq.heappop(self._free)
            for slot in sequence.slots:
                self._prefixes.vacate(slot, self._free, sequence.wanted)
            self._running[sequence.request.id] = sequence
            self._begin(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self) -> list[list[Chunk]]:
        """The passes of the next step, each with its chunks in order of slot: chunks of prompts, those of like length
        together, then single tokens, of rows that decode and of prompts that are all but computed."""
        rows = sorted(self._running.values(), key=lambda sequence: sequence.slot)
        ones = [Chunk(row, row.computed, len(row.ids)) for row in rows if row.is_decoding]
        prompts = [row for row in rows if not row.is_decoding and row.leader is None]
        chunks = self._prefill(prompts, self._pace.tokens() if ones else self._chunk_tokens * UNDISTURBED)
        ones += [chunk for chunk in chunks if len(chunk) == 1 and not chunk.scores]
        passes = _alike([chunk for chunk in chunks if chunk.scores])
        passes += _alike([chunk for chunk in chunks if len(chunk) > 1 and not chunk.scores])
        return [sorted(one, key=lambda chunk: chunk.slot) for one in [*passes, ones] if one]

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk's KV has been computed."""
        sequence = chunk.sequence
        self._prefixes.note(chunk.slot, chunk.start, chunk.ids, sequence.steered_from, sequence.digest)
        if sequence.shadow is not None:
            self._prefixes.note(sequence.shadow, chunk.start, chunk.ids, None, "")
        sequence.computed = chunk.end
        sequence.count(chunk.steered_positions)

    def remove(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Take a sequence out, wherever it is, and free its slots; what they hold is kept if it is sound."""
        if self._running.pop(sequence.request.id, None) is None:
            self._waiting.remove(sequence)
            return
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)
            if sound:
                self._prefixes.release(slot, continued=sequence.continued)
            else:
                self._prefixes.forget(slot)

    def running_sequences(self) -> list[Sequence]:
        return list(self._running.values())

    def check_integrity(self) -> None:
        """Every slot is free or held by exactly one running sequence; for tests."""
        held = [slot for sequence in self._running.values() for slot in sequence.slots]
        assert sorted(held + self._free) == list(range(self.num_slots)), (held, self._free)

    def _begin(self, sequence: Sequence) -> None:
        """Take what is computed of a prompt already, or wait for the one that is computing more of it."""
        wanted = sequence.wanted
        source, shared = self._prefixes.longest(wanted)
        if any(slot != source for slot in sequence.slots) and shared < LEAST:
            source, shared = sequence.slot, 0
        sequence.leader, sequence.awaited = self._leader(sequence, wanted)
        if sequence.awaited - shared >= LEAST:
            return
        for slot in sequence.slots:
            self._prefixes.adopt(slot, source if shared else slot, shared)
        sequence.reuse(shared)

    def _leader(self, sequence: Sequence, wanted: Trace) -> tuple[Sequence | None, int]:
        """The earlier sequence whose prompt, still to be computed, has most in common with a prompt, and how much."""
        leader, most = None, 0
        for other in self._running.values():
            if other is sequence or not self._prefixes.shares or not len(wanted):
                break
            if not other.is_decoding and (shared := other.prompt_trace.shared(wanted)) > most:
                leader, most = other, shared
        return leader, most

    def _prefill(self, rows: list[Sequence], budget: int) -> list[Chunk]:
        """Share the budget evenly; what short prompts leave over goes to the longer ones."""
        chunks = []
        remaining = sorted(rows, key=lambda row: row.prompt_length - row.computed)
        for index, row in enumerate(remaining):
            share = max(1, budget // (len(remaining) - index))
            length = min(share, row.prompt_end - row.computed)
            budget = max(0, budget - length)
            chunks.append(Chunk(row, row.computed, row.computed + length))
        return chunks


def _alike(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Chunks that are computed together, so that what pads the shorter ones and the passes themselves cost least."""
    ordered = sorted(chunks, key=len, reverse=True)
    count = len(ordered)
    costs, ends = [0] * (count + 1), [0] * count  # of the chunks from each one on, and where its pass ends
    for first in reversed(range(count)):
        width = len(ordered[first])
        costs[first], ends[first] = min(
            (PASS + (end - first) * width + costs[end], end) for end in range(first + 1, count + 1)
        )
    passes, first = [], 0
    while first < count:
        passes.append(ordered[first : ends[first]])
        first = ends[first]
    return passes
