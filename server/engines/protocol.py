"""What the server may ask of an engine, and what an engine answers.

Every message is a frozen dataclass of plain values, which can be pickled and sent to another process. Nothing here
imports torch or transformers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from server.engines.errors import reject
from steering_vectors.errors import SteeringError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steering_vectors.profiles.profile import ModelIdentity, Profile

ApplyTo = Literal["generated", "all"]
Operator = Literal["add", "ablate"]
Interpolation = Literal["step", "linear"]
FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
ConstraintKind = Literal["json", "regex", "choice", "lark"]
Capability = Literal[
    "ablate",
    "apply_to_all",
    "constraints",
    "divergence",
    "gates",
    "layers",
    "live_steering",
    "logprobs",
    "preserve_norm",
    "projections",
    "prompt_logprobs",
    "schedules",
    "scoring",
]
ALL_CAPABILITIES: frozenset[Capability] = frozenset(get_args(Capability))

MAX_CONSTRAINT_BYTES = 2**16
MAX_SCHEDULE_TOKEN = 4096
MAX_SCHEDULES = 16  # of one plan: each is evaluated at every token at which one of them changes


# What a request says.


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is drawn. Temperature 0 is greedy. `max_tokens` None means up to the end of the context.

    The order is: penalties and logit_bias on the logits, the constraint, temperature, top_k, top_p, min_p.
    `repetition_penalty` looks at prompt and completion (Keskar et al. 2019), presence and frequency at the completion
    (OpenAI). With `max_tokens` 0 the prompt is computed and nothing is generated. Before `min_tokens` tokens neither an
    end-of-sequence token, a stop token nor a stop string ends the text; a constraint that allows nothing more does. A
    stop string that is one special token acts as a stop token. Raises RequestError that names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limit = self.min_tokens if self.max_tokens is None else self.max_tokens
        for name, fits, rule in (
            ("temperature", 0 <= self.temperature <= 100, "lie in 0 to 100"),
            ("min_p", 0 <= self.min_p <= 1, "lie in 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "lie in 0.01 to 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "lie in -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "lie in -2 to 2"),
            ("top_p", 0 < self.top_p <= 1, "lie above 0 and up to 1"),
            ("top_k", self.top_k >= 0, "be 0 (all) or more"),
            ("max_tokens", self.max_tokens is None or limit >= 0, "be 0 or more"),
            ("min_tokens", self.min_tokens >= 0, "be 0 or more"),
        ):
            reject(not fits, f"{name} must {rule}, not {getattr(self, name)!r}", name)
        message = f"min_tokens ({self.min_tokens}) is more than max_tokens ({limit})"
        reject(self.min_tokens > limit, message, "min_tokens")
        reject(any(not text for text in self.stop), "a stop string must not be empty", "stop")


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that a text must have: `text` is a JSON schema, a regular expression, a JSON list of choices, or a
    grammar in llguidance's variant of Lark. Raises RequestError for more than 64 KiB."""

    kind: ConstraintKind
    text: str

    def __post_init__(self) -> None:
        size = len(self.text.encode())
        limit = MAX_CONSTRAINT_BYTES
        reject(size > limit, f"constraint has {size} bytes; at most {limit} are taken: make it shorter", "constraint")


@dataclass(frozen=True, slots=True)
class StrengthSchedule:
    """A strength that changes while a text is generated.

    `points` are (token, strength) pairs, ascending from token 0. `step` holds each strength until the next point,
    `linear` interpolates between points. After the last point the strength stays. Raises SteeringError.
    """

    points: tuple[tuple[int, float], ...]
    interpolation: Interpolation = "step"

    def __post_init__(self) -> None:
        tokens = [token for token, _ in self.points]
        if not tokens or tokens[0] != 0:
            raise SteeringError("a schedule begins with the strength from token 0", param="schedule")
        if any(later <= earlier for earlier, later in pairwise(tokens)):
            raise SteeringError("a schedule's tokens must rise from point to point", param="schedule")
        if tokens[-1] > MAX_SCHEDULE_TOKEN:
            raise SteeringError(f"a schedule ends by token {MAX_SCHEDULE_TOKEN}", param="schedule")
        if not all(math.isfinite(strength) for _, strength in self.points):
            raise SteeringError("the strengths of a schedule must be finite numbers", param="schedule")

    def at(self, token: int) -> float:
        """The strength under which a token is drawn."""
        place = bisect_right(self.points, token, key=lambda point: point[0]) - 1
        start, strength = self.points[place]
        if self.interpolation == "step" or place + 1 == len(self.points):
            return strength
        end, later = self.points[place + 1]
        value = strength + (later - strength) * (token - start) / (end - start)
        return min(max(value, min(strength, later)), max(strength, later))  # rounding stays within the ends

    def next_change(self, token: int) -> int | None:
        """The first later token with another strength; None if there is none."""
        place = bisect_right(self.points, token, key=lambda point: point[0]) - 1
        strength = self.points[place][1]
        for (start, before), (end, after) in pairwise(self.points[place:]):
            if self.interpolation == "linear" and before != after:
                return max(start, token) + 1
            if after != strength:
                return end
        return None


@dataclass(frozen=True, slots=True)
class PlanTerm:
    """One profile of a plan, by name and version (the sha256 of its file), at a strength or a schedule of strengths.

    `layers` None means all blocks that the profile has. With a schedule, `strength` is not used. Raises SteeringError.
    """

    profile: str
    version: str
    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    schedule: StrengthSchedule | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise SteeringError(f"the strength of {self.profile!r} must be a finite number", param="strength")

    def at(self, token: int) -> float:
        """The strength under which a token is drawn; tokens count from the beginning of the plan."""
        return self.strength if self.schedule is None else self.schedule.at(token)

    @property
    def acts(self) -> bool:
        """Whether it has a strength other than 0 at any token."""
        return bool(self.strength) if self.schedule is None else any(strength for _, strength in self.schedule.points)


@dataclass(frozen=True, slots=True)
class SteeringPlan:
    """The steering that a request asks for. It is hashable and holds no tensors. The default is the untouched model.

    Raises SteeringError if a profile occurs twice, or too many have a schedule.
    """

    terms: tuple[PlanTerm, ...] = ()
    apply_to: ApplyTo = "generated"
    preserve_norm: bool = False
    allow_beyond_safe: bool = False

    def __post_init__(self) -> None:
        if self.apply_to not in get_args(ApplyTo):
            raise SteeringError(f"apply_to is {self.apply_to!r}, not one of generated, all", param="apply_to")
        names: set[str] = set()
        for term in self.terms:
            if term.profile in names:
                raise SteeringError(f"profile {term.profile!r} occurs twice in one steering", param="terms")
            names.add(term.profile)
        schedules = sum(term.schedule is not None for term in self.terms)
        if schedules > MAX_SCHEDULES:
            message = f"{schedules} profiles have a schedule; at most {MAX_SCHEDULES} may have one"
            raise SteeringError(message, param="schedule")

    @property
    def versions(self) -> tuple[str, ...]:
        """The profile versions that an engine needs, in the order of the terms."""
        return tuple(term.version for term in self.terms)

    def strengths(self, token: int) -> tuple[float, ...]:
        """The strength of each term under which a token is drawn."""
        return tuple(term.at(token) for term in self.terms)

    def next_change(self, token: int) -> int | None:
        """The first later token at which a strength changes; None if there is none."""
        found = (term.schedule.next_change(token) for term in self.terms if term.schedule is not None)
        return min((change for change in found if change is not None), default=None)

    def changes(self, end: int) -> list[int]:
        """Token 0, and every token before `end` at which a strength changes."""
        tokens = [0]
        while (later := self.next_change(tokens[-1])) is not None and later < end:
            tokens.append(later)
        return tokens


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, how to sample, how to steer, and what to report.

    `ids` has one id for each choice, unique among live requests; choice i draws from (seed, i). `logprobs` and
    `prompt_logprobs` ask for the log-probability of each generated or prompt token, with that many of the likeliest
    tokens beside it. `scored_suffix` says that the last tokens of `prompt_ids` are a completion to be scored: steering
    of generated tokens begins before them, and only they are scored. `divergence` asks for KL(steered‖unsteered) of the
    distribution that each token was drawn from, before penalties and temperature. `projections` names the profile
    versions on whose directions the residual stream is projected where each token is drawn. A text under a constraint
    ends with reason "stop" once nothing more may follow, even before `min_tokens`. A prompt's KV is reused for requests
    of the same `tenant` only, and free slots are shared between tenants. A choice that has not ended `timeout` seconds
    after `submit` ends with reason "timeout".
    """

    ids: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    sampling: SamplingParameters = SamplingParameters()
    plan: SteeringPlan = SteeringPlan()
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    scored_suffix: int = 0
    divergence: bool = False
    projections: tuple[str, ...] = ()
    tenant: str = ""
    timeout: float | None = None

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def versions(self) -> tuple[str, ...]:
        return (*self.plan.versions, *self.projections)


def capabilities_needed(request: GenerationRequest) -> dict[Capability, str]:
    """What an engine must be able to do to carry out a request, each with the field that asks for it."""
    plan = request.plan
    asked: dict[Capability, tuple[bool, str]] = {
        "apply_to_all": (plan.apply_to == "all", "apply_to"),
        "preserve_norm": (plan.preserve_norm, "preserve_norm"),
        "schedules": (any(term.schedule is not None for term in plan.terms), "schedule"),
        "layers": (any(term.layers is not None for term in plan.terms), "layers"),
        "constraints": (request.constraint is not None, "constraint"),
        "logprobs": (request.logprobs is not None, "logprobs"),
        "prompt_logprobs": (request.prompt_logprobs is not None, "prompt_logprobs"),
        "scoring": (request.scored_suffix > 0, "scored_suffix"),
        "divergence": (request.divergence, "divergence"),
        "projections": (bool(request.projections), "projections"),
    }
    return {capability: param for capability, (wanted, param) in asked.items() if wanted}


# What an engine answers. Every event has the `id` of the choice that it belongs to.


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log P of a token in nats, by the model as it was steered, before penalties, bias and temperature; and the
    likeliest tokens at its position, as (id, log P) in descending order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Sent before the first Delta where `prompt_logprobs` asked for it: one for each prompt token but the first, or for
    each token of the scored suffix."""

    id: str
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text that no later token changes, and the ids that were drawn (their text may follow later), with their
    log-probabilities, divergences and projections where they were asked for."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()  # [tokens][profiles]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The similarity of a prompt to a profile's condition (None: the prompt was too short), and whether it opened the
    gate."""

    similarity: float | None
    opened: bool


@dataclass(frozen=True, slots=True)
class AppliedTerm:
    """What a term of a plan did in a segment, for the receipt.

    `layers` are those at which it acted: none if the strength was 0 throughout, or behind a closed gate.
    `steered_tokens` counts the positions. `calibrated`: the profile was used as it was calibrated.
    """

    term: PlanTerm
    operator: Operator
    layers: tuple[int, ...]
    calibrated: bool
    steered_tokens: int = 0
    gate_closed: bool = False

    def at(self, token: int) -> float:
        """The strength that acted when a token was drawn; tokens count from the beginning of the segment."""
        return 0.0 if self.gate_closed else self.term.at(token)


@dataclass(frozen=True, slots=True)
class Segment:
    """One plan of a request, from the drawing of token `from_token` of the completion on. A schedule does not begin a
    new segment, a change of a running request does."""

    from_token: int
    plan: SteeringPlan
    terms: tuple[AppliedTerm, ...]


@dataclass(frozen=True, slots=True)
class SteeringChange:
    """From where a changed steering holds.

    Tokens of the completion before `from_token` were drawn under the plan before. The keys and values of positions
    before `position` (in prompt and completion) stay as they are. `segment` is what holds now.
    """

    id: str
    from_token: int
    position: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class Times:
    """How long a choice waited for a slot, from there to its first token, and from there to its end, in seconds."""

    queue: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of every choice of an accepted request.

    `steered_tokens` counts the positions at which the residual stream was changed, `cached_tokens` the prompt tokens
    whose KV was reused. `error` is set for two reasons: for "error", where `error_param` is the field of the request
    that caused it, None for a fault of the model or the engine; and for "timeout", where it says how far the choice
    came. `matched_stop` is the stop string or stop token id that ended the text, None for an end-of-sequence token.
    `segments` are the plans, one unless they changed. `ending` is the log-probability of an end-of-sequence or stop
    token, which is counted but in no Delta. `times` is None if the engine is gone.
    """

    id: str
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    steered_tokens: int = 0
    error: str | None = None
    error_param: str | None = None
    matched_stop: str | int | None = None
    segments: tuple[Segment, ...] = ()
    gates: Mapping[str, GateDecision] = field(default_factory=dict)  # by profile
    ending: tuple[TokenLogprob, ...] = ()  # one or none
    times: Times | None = field(default=None, compare=False)


Event = PromptLogprobs | Delta | Finished


@dataclass(frozen=True, slots=True)
class TermEffect:
    """One profile of a plan at its first token, with what is known about the profile."""

    applied: AppliedTerm
    method: str
    unit: float
    safe_range: tuple[float, float]
    kl_at_1: float | None


@dataclass(frozen=True, slots=True)
class BlockEffect:
    """The norm of what a plan adds at one block at its first token; the usual norm of the residual stream there is None
    if no profile knows it."""

    block: int
    shift_norm: float
    residual_norm: float | None


@dataclass(frozen=True, slots=True)
class PlanEffect:
    """What a plan would do, without generating."""

    terms: tuple[TermEffect, ...]
    blocks: tuple[BlockEffect, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EngineInfo:
    """What does not change while an engine lives. It can be pickled."""

    name: str  # of the kind of engine, which errors name
    model_name: str  # hub id or directory
    identity: ModelIdentity
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    dtype: str
    context: int  # the most tokens of prompt and completion together
    slots: int
    capacity: int  # generations that may run and wait at once
    path: str  # how the model is run: "batched" or a fallback
    capabilities: frozenset[Capability] = ALL_CAPABILITIES


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: what is so now, and totals since the start, from `steps` on."""

    running: int = 0
    waiting: int = 0
    slots_used: int = 0
    kv_tokens: int = 0  # of running choices
    kept_tokens: int = 0  # whose KV is kept in free slots, for prompts that begin with them
    profiles: int = 0  # versions held
    steps: int = 0
    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # of prompts, reused
    generated_tokens: int = 0
    steered_tokens: int = 0
    nonfinite_rows: int = 0  # choices that ended because their logits were not finite
    finished: Mapping[str, int] = field(default_factory=dict)  # by reason
    restarts: int = 0


class EventStream(Protocol):
    """The events of all choices of one `submit`, an async iterator. `aclose`, or dropping the stream, cancels what has
    not finished."""

    def __aiter__(self) -> EventStream: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """One model. Methods are called from the event loop and never block it. Errors name fields of this file in `param`.

    Methods that take a plan raise UnknownProfile for a version that is not loaded, and SteeringError for a plan that
    the profiles do not allow. All but `info` and `stats` raise Unavailable if the engine is closed.
    """

    @property
    def info(self) -> EngineInfo: ...

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        """Accept all requests or none, and iterate over their events in one stream.

        For each choice the stream has any number of PromptLogprobs and Delta, then exactly one Finished. Constraints
        are compiled before this returns. Raises RequestError for a prompt, sampling parameter or constraint that cannot
        be used, Conflict for an id that is live, Overloaded if the queue is full. Closing the stream, or cancelling the
        task that iterates, cancels what has not finished.
        """
        ...

    async def set_steering(self, id: str, plan: SteeringPlan) -> SteeringChange:
        """Change the plan of a live choice from its next token on; token 0 of a schedule is that next token.

        Raises UnknownGeneration for an id that never was (or ended long ago), Conflict for one that has ended, and
        SteeringError for a profile with a gate that the prompt did not decide.
        """
        ...

    async def cancel(self, id: str) -> bool:
        """End a choice with reason "cancelled"; False if it is not live."""
        ...

    async def explain(self, plan: SteeringPlan) -> PlanEffect: ...

    async def load_profile(self, profile: Profile) -> None:
        """Check that a profile fits the model, and hold its vectors by version.

        Versions are counted: one that was loaded twice, or that a live request uses, is freed when the last of them
        lets go of it. Raises ProfileError or ProfileMismatch.
        """
        ...

    async def unload_profile(self, version: str) -> None:
        """Let go of a version; requests that run with it keep it until they end."""
        ...

    def stats(self) -> EngineStats: ...

    def health(self) -> str | None:
        """Why the engine cannot go on: it has failed, or a step takes longer than it may. None if it can."""
        ...

    async def close(self) -> None:
        """Cancel what runs and free the model. May be called again."""
        ...
