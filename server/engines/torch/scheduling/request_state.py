"""One request under way: its tokens, how far they are computed, what steers them, and which part runs next.

No torch: numbers and lists only. Knows nothing of slots' contents, queues, models or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from server.engines.protocol import FinishReason, GateDecision, GenerationRequest, Segment
from server.engines.torch.scheduling.prefix_reuse import Trace
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.mixture import Mixture


@dataclass(slots=True, eq=False)
class Sequence:
    """One request under way: its tokens so far, and how many of them have their KV computed."""

    request: GenerationRequest
    slot: int = -1
    shadow: int | None = None  # the slot that computes the same text unsteered
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    finish: FinishReason | None = None
    cached: int = 0  # positions of the prompt whose KV was made by another request
    leader: Sequence | None = None  # computes a part of the prompt, `awaited` positions, that this one waits for
    awaited: int = 0
    segments: list[Segment] = field(default_factory=list)
    scheduled: deque[tuple[int, Mixture]] = field(default_factory=deque)
    digest: str = ""  # of what steers it now
    # First position at which that holds: the last prompt token, or 0; None for the untouched model. What was computed
    # before the mix changed stays.
    steered_from: int | None = None

    conditions: dict[str, Gate] = field(default_factory=dict)  # by profile, also those that join later
    gates: dict[str, GateDecision] = field(default_factory=dict)  # by profile, once they are decided

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        for mixture in (self.request.mixture, *(later for _, later in self.request.schedule)):
            self.conditions |= {term.profile.name: gate for term in mixture.gated if (gate := term.profile.gate)}
        if self.prompt_length == 1:  # a gate looks at all tokens but the last
            self.gates = dict.fromkeys(self.conditions, GateDecision(None, False))
        self._begin(0, self.request.mixture)
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
        if not self.conditions:
            return mixture
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
        self._begin(self.completion_length, mixture)
        return self.completion_length

    def _begin(self, token: int, mixture: Mixture) -> None:
        mixture = self._gated(mixture)
        self.segments.append(Segment(token, mixture, 0))
        self.digest = mixture.digest()
        first = 0 if mixture.apply_to == "all" else self.prompt_length - self.request.given - 1
        self.steered_from = first if self.digest else None

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
    def wanted(self) -> Trace:
        """What the part of the prompt is made from that may come from another request: nothing that must be seen to be
        computed, and nothing that is not alike in all slots."""
        trace = self.prompt_trace
        if self.conditions or (self.request.prompt_logprobs is not None and not self.request.given):
            return trace.head(0)
        steered = 0 if self.shadow is None or self.steered_from is None else self.prompt_length - self.steered_from
        return trace.head(self.prompt_length - max(1 + self.request.given, steered))

    @property
    def continued(self) -> bool:
        """Whether another request is likely to begin with this text: not one that only tells how likely it is."""
        return self.request.prompt_logprobs is None or self.request.given > 0

    @property
    def prompt_trace(self) -> Trace:
        """What the prompt's KV is made from, as it is steered now."""
        return Trace.of(self.ids[: self.prompt_length], self.steered_from, self.digest)

    def reuse(self, length: int) -> None:
        """So many positions of the prompt are computed already, steered as they are to be."""
        self.computed = self.cached = length
        self.leader = None
        if (first := self.steered_from) is not None:
            self.count(max(0, length - first))

    @property
    def is_following(self) -> bool:
        """Whether it waits for what another one computes."""
        leader = self.leader
        return leader is not None and leader.finish is None and leader.computed < self.awaited

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


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions `start` to `end` (exclusive) of a sequence, to be computed in one forward pass."""

    sequence: Sequence
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

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
        """Whether it predicts tokens of the prompt whose log-probabilities are wanted."""
        return self.scored_from < min(self.end, self.sequence.prompt_length)

    @property
    def scored_from(self) -> int:
        """The first of its positions that predicts a token to be scored; its end if none does."""
        request = self.sequence.request
        if request.prompt_logprobs is None:
            return self.end
        return max(self.start, self.sequence.prompt_length - request.given - 1 if request.given else 0)

    @property
    def steered_positions(self) -> int:
        first = self.sequence.steered_from
        return 0 if first is None else max(0, self.end - max(first, self.start))
