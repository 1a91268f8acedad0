"""Which tokens of which sequences run in the next step. No torch: numbers and lists only.

Owns the queue, the slots and each sequence's progress. A sequence takes the lowest free slot, its prompt is computed
in chunks that share a budget of tokens per step, and then it decodes one token a step; rows join and leave between
steps. Knows nothing of models, text or sampling.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from server.engine.protocol import FinishReason, GateDecision, GenerationRequest, Segment
from steering_vectors.gate import Gate
from steering_vectors.mixture import Mixture


@dataclass(slots=True, eq=False)
class Sequence:
    """One request under way: its tokens so far, and how many of them have their KV computed."""

    request: GenerationRequest
    slot: int = -1
    shadow: int | None = None  # the slot that computes the same text unsteered
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    finish: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)
    scheduled: deque[tuple[int, Mixture]] = field(default_factory=deque)

    conditions: dict[str, Gate] = field(default_factory=dict)  # by profile, also those that join later
    gates: dict[str, GateDecision] = field(default_factory=dict)  # by profile, once they are decided

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        for mixture in (self.request.mixture, *(later for _, later in self.request.schedule)):
            self.conditions |= {term.profile.name: gate for term in mixture.gated if (gate := term.profile.gate)}
        if self.prompt_length == 1:  # a gate looks at all tokens but the last
            self.gates = dict.fromkeys(self.conditions, GateDecision(None, False))
        self.segments.append(Segment(0, self._gated(self.request.mixture), 0))
        self.scheduled.extend(self.request.schedule)

    @property
    def undecided(self) -> dict[str, Gate]:
        """The gates, by profile, that the prompt has yet to decide."""
        return {name: gate for name, gate in self.conditions.items() if name not in self.gates}

    def decide(self, gates: Mapping[str, GateDecision]) -> None:
        """Open the gates that the prompt opens."""
        self.gates.update(gates)
        self.steer(self.mixture)

    def _gated(self, mixture: Mixture) -> Mixture:
        """The mix without the profiles whose gate is not open."""
        opened = {name for name, gate in self.gates.items() if gate.opened}
        shut = frozenset(term.profile.name for term in mixture.gated if term.profile.name not in opened)
        return mixture if shut == mixture.closed else replace(mixture, closed=shut)

    @property
    def slots(self) -> list[int]:
        """What it holds: nothing while it waits."""
        return [slot for slot in (self.slot, self.shadow) if slot is not None and slot >= 0]

    @property
    def mixture(self) -> Mixture:
        """What steers it now."""
        return self.segments[-1].mixture

    @property
    def steered_tokens(self) -> int:
        return sum(segment.steered_tokens for segment in self.segments)

    def steer(self, mixture: Mixture) -> int:
        """Change the mix for all positions that are not computed yet; the first token that is drawn under it."""
        if self.segments[-1].from_token == self.completion_length and not self.segments[-1].steered_tokens:
            self.segments.pop()
        self.segments.append(Segment(self.completion_length, self._gated(mixture), 0))
        return self.completion_length

    def take_scheduled(self) -> Mixture | None:
        """The mix that is due for the next token, if another one is."""
        due = None
        while self.scheduled and self.scheduled[0][0] <= self.completion_length:
            _, due = self.scheduled.popleft()
        return due

    def count(self, positions: int) -> None:
        """Note that so many positions were steered."""
        last = self.segments[-1]
        self.segments[-1] = replace(last, steered_tokens=last.steered_tokens + positions)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def completion_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def prompt_end(self) -> int:
        """How far the prompt can be computed now: up to its last token, while that waits for a gate."""
        return self.prompt_length - 1 if self.undecided else self.prompt_length

    @property
    def is_decoding(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def steered_from(self) -> int | None:
        """First position at which steering holds: the last prompt token, or 0; None for the untouched model. What was
        computed before the mix changed stays."""
        mixture = self.mixture
        if mixture.is_neutral:
            return None
        return 0 if mixture.apply_to == "all" else self.prompt_length - self.request.given - 1


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions `start` to `end` (exclusive) of a sequence, to be computed in one forward pass."""

    sequence: Sequence
    start: int
    end: int

    @property
    def slot(self) -> int:
        return self.sequence.slot

    @property
    def ids(self) -> list[int]:
        return self.sequence.ids[self.start : self.end]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be drawn."""
        return self.end == len(self.sequence.ids)

    @property
    def scores(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted, and this is of the prompt."""
        return self.sequence.request.prompt_logprobs is not None and self.start < self.sequence.prompt_length

    @property
    def steered_positions(self) -> int:
        first = self.sequence.steered_from
        return 0 if first is None else max(0, self.end - max(first, self.start))


class Scheduler:
    """Three verbs: `add`, `schedule`, `remove`.

    `chunk_tokens` bounds the prompt tokens computed in one step, so that decoding rows wait no longer than that.
    """

    def __init__(self, *, slots: int, chunk_tokens: int) -> None:
        self.num_slots = slots
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
        admitted = []
        while self._waiting and len(self._free) >= 1 + self._waiting[0].request.divergence:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            if sequence.request.divergence:
                sequence.shadow = heapq.heappop(self._free)
            self._running[sequence.request.id] = sequence
            admitted.append(sequence)
        return admitted

    def schedule(self) -> tuple[list[Chunk], list[Chunk]]:
        """The next step: chunks of prompts, and the decoding rows' next tokens; each in order of slot."""
        rows = sorted(self._running.values(), key=lambda sequence: sequence.slot)
        decoding = [Chunk(row, row.computed, len(row.ids)) for row in rows if row.is_decoding]
        return self._prefill([row for row in rows if not row.is_decoding]), decoding

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk's KV has been computed."""
        chunk.sequence.computed = chunk.end
        chunk.sequence.count(chunk.steered_positions)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its slot."""
        if self._running.pop(sequence.request.id, None) is None:
            self._waiting.remove(sequence)
            return
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)

    def running_sequences(self) -> list[Sequence]:
        return list(self._running.values())

    def check_integrity(self) -> None:
        """Every slot is free or held by exactly one running sequence; for tests."""
        held = [slot for sequence in self._running.values() for slot in sequence.slots]
        assert sorted(held + self._free) == list(range(self.num_slots)), (held, self._free)

    def _prefill(self, rows: list[Sequence]) -> list[Chunk]:
        """Share the budget evenly; what short prompts leave over goes to the longer ones."""
        chunks, budget = [], self._chunk_tokens
        remaining = sorted(rows, key=lambda row: row.prompt_length - row.computed)
        for index, row in enumerate(remaining):
            share = max(1, budget // (len(remaining) - index))
            length = min(share, row.prompt_end - row.computed)
            budget = max(0, budget - length)
            chunks.append(Chunk(row, row.computed, row.computed + length))
        return sorted(chunks, key=lambda chunk: chunk.slot)
