"""One choice of a request in the engine, from its admission to its last event, and the part of it that runs next."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engines.protocol import FinishReason, GenerationRequest, Times, TokenLogprob
from server.engines.torch.scheduling.prefix_reuse import PrefixKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from server.engines.detokenizer import Detokenizer
    from server.engines.mailbox import Mailbox
    from server.engines.torch.plans import SteeringState
    from server.engines.torch.sampling.request_sampler import RequestSampler
    from steering_vectors.profiles.profile import Profile


@dataclass(slots=True, eq=False)
class RequestState:
    """Everything that belongs to one choice. `pinned` are the profile versions that it holds."""

    id: str
    request: GenerationRequest
    steering: SteeringState
    sampler: RequestSampler
    detokenizer: Detokenizer
    stop_ids: Mapping[int, int | str] = field(default_factory=dict)  # what each of them is reported as
    projected: tuple[Profile, ...] = ()
    pinned: tuple[str, ...] = ()
    mailbox: Mailbox | None = None

    slot: int = -1
    unsteered_slot: int | None = None  # computes the same text unsteered, for divergences
    ids: list[int] = field(default_factory=list)
    computed: int = 0  # positions whose KV is there
    cached: int = 0  # positions of the prompt whose KV another request computed
    leader: RequestState | None = None  # computes a prefix of the prompt, `awaited` positions, that this one waits for
    awaited: int = 0
    finish: FinishReason | None = None
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float | None = None  # when it got its slot
    first_token: float | None = None  # when its first token was drawn
    deadline: float = math.inf  # when it ends, finished or not; as all of these times by `time.perf_counter`

    prompt_scores: list[TokenLogprob] = field(default_factory=list)
    gate_sums: dict[str, torch.Tensor] = field(default_factory=dict)  # by gated profile, of the prompt's residuals
    unsteered_logits: torch.Tensor | None = None  # for the token to be drawn, [vocabulary]

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def completion_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def slots(self) -> list[int]:
        """The slots it holds: none while it waits."""
        return [slot for slot in (self.slot, self.unsteered_slot) if slot is not None and slot >= 0]

    def times(self) -> Times:
        """How long it took until now."""
        now = time.perf_counter()
        admitted = self.admitted or now
        first_token = self.first_token or now
        return Times(admitted - self.submitted, first_token - admitted, now - first_token)

    @property
    def is_decoding(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def is_following(self) -> bool:
        """Whether it waits for a prefix that another request computes."""
        leader = self.leader
        return leader is not None and leader.finish is None and leader.computed < self.awaited

    @property
    def prompt_end(self) -> int:
        """How far the prompt can be computed now: up to its last token while a gate is undecided."""
        return self.prompt_length - 1 if self.steering.undecided else self.prompt_length

    @property
    def prompt_key(self) -> PrefixKey:
        """The KV prefix key of the prompt, as it is steered now."""
        ids, steering = self.ids[: self.prompt_length], self.steering
        return PrefixKey.of(ids, steering.steered_from, steering.digest, self.request.tenant)

    @property
    def reusable(self) -> PrefixKey:
        """The prompt prefix whose KV may be copied from another slot: nothing whose logits or residuals are needed, and
        with divergences only what is the same in both slots."""
        if self.steering.conditions or (self.request.prompt_logprobs is not None and not self.request.scored_suffix):
            return PrefixKey()
        steered_from = self.steering.steered_from
        steered = 0 if self.unsteered_slot is None or steered_from is None else self.prompt_length - steered_from
        return self.prompt_key.head(self.prompt_length - max(1 + self.request.scored_suffix, steered))

    @property
    def continued(self) -> bool:
        """Whether another request is likely to begin with this text; a prompt that was only scored is not."""
        return self.request.prompt_logprobs is None or self.request.scored_suffix > 0

    def reuse(self, length: int) -> None:
        """The first `length` positions of the prompt are computed already, steered as they must be."""
        self.computed = self.cached = length
        self.leader = None
        if (first := self.steering.steered_from) is not None:
            self.steering.count(max(0, length - first))


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions `start` to `end` (exclusive) of one choice, to be computed in one forward pass."""

    state: RequestState
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def slot(self) -> int:
        return self.state.slot

    @property
    def ids(self) -> list[int]:
        return self.state.ids[self.start : self.end]

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last token, so that the next one can be drawn."""
        return self.end == len(self.state.ids)

    @property
    def scores(self) -> bool:
        """Whether it predicts prompt tokens whose log-probabilities are wanted."""
        return self.scored_from < min(self.end, self.state.prompt_length)

    @property
    def scored_from(self) -> int:
        """The first of its positions that predicts a token to be scored; its end if none does."""
        request = self.state.request
        if request.prompt_logprobs is None:
            return self.end
        first = self.state.prompt_length - request.scored_suffix - 1 if request.scored_suffix else 0
        return max(self.start, first)

    @property
    def steered_positions(self) -> int:
        first = self.state.steering.steered_from
        return 0 if first is None else max(0, self.end - max(first, self.start))
