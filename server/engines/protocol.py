"""What the rest of the server may ask of an engine, and what an engine answers.

Every message that crosses the border between the event loop and the engine's thread is a frozen dataclass of this
file. Knows nothing of HTTP, of tensors or of how an engine works: a second engine can stand beside the first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.engines.errors import reject
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.profiles.profile import Profile

FinishReason = Literal["stop", "length", "cancelled", "error"]
ConstraintKind = Literal["json", "regex", "choice", "lark"]

LONGEST_CONSTRAINT = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is drawn. Temperature 0 is greedy. `max_tokens` None means up to the context's end.

    Order: penalties and logit_bias on the logits, then a grammar if the request has one, then temperature, then top_k,
    top_p, min_p. `repetition_penalty` looks at prompt and completion (Keskar et al. 2019), presence and frequency at
    the completion (OpenAI). With `max_tokens` 0 the prompt is computed and nothing is written. Raises RequestError that
    names the field.
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
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            reject(not low <= value <= high, f"{name} must lie in {low:g} to {high:g}, not {value!r}", name)
        reject(not 0 < self.top_p <= 1, f"top_p must lie above 0 and up to 1, not {self.top_p!r}", "top_p")
        reject(self.top_k < 0, f"top_k must be 0 (all) or more, not {self.top_k}", "top_k")
        limit = self.max_tokens
        reject(limit is not None and limit < 0, f"max_tokens must be 0 or more, not {limit}", "max_tokens")
        reject(self.min_tokens < 0, f"min_tokens must be 0 or more, not {self.min_tokens}", "min_tokens")
        reject(
            limit is not None and self.min_tokens > limit,
            f"min_tokens ({self.min_tokens}) is more than max_tokens ({limit})",
            "min_tokens",
        )
        reject(any(not text for text in self.stop), "a stop string must not be empty", "stop")


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a text must be: `text` is a JSON schema, a regular expression, a JSON list of choices, or a grammar in
    llguidance's variant of Lark. `field` is the request's field that asked for it, which errors name. Raises
    RequestError for more than 64 KiB."""

    kind: ConstraintKind
    text: str
    field: str

    def __post_init__(self) -> None:
        size = len(self.text.encode())
        limit = LONGEST_CONSTRAINT
        reject(size > limit, f"{self.field} has {size} bytes; at most {limit} are taken: make it shorter", self.field)


class Grammar(Protocol):
    """A constraint as an engine compiled it, for any number of that engine's requests."""

    @property
    def constraint(self) -> Constraint: ...


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One row's worth of work: a tokenised prompt, how to sample, how to steer.

    `id` is unique among live requests. `choice` is the index i among `n` choices: it draws from (seed, i). `logprobs`
    and `prompt_logprobs` ask for the log-probability of each token written, and of each of the prompt, with so many of
    the likeliest beside it. `given` says that the last so many of `prompt_ids` are a completion to be scored: steering
    of what is generated begins before them. `schedule` changes the mix: from the token of each entry on, ascending.
    `divergence` asks for KL(steered‖unsteered) of the distribution that each token was drawn from, before penalties and
    temperature; a second slot computes the same text unsteered beside it. `projections` names profiles on whose
    directions the residual stream is projected where each token is drawn. `grammar` is what the text must obey, as this
    engine compiled it: a text that does may end, and ends with reason "stop" once nothing more may follow, even before
    `min_tokens`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParameters = SamplingParameters()
    mixture: Mixture = Mixture()
    choice: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    given: int = 0
    schedule: tuple[tuple[int, Mixture], ...] = ()
    divergence: bool = False
    projections: tuple[Profile, ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log P of a token in nats, by the model as it was steered, before penalties, bias and temperature; and the
    likeliest tokens at its place, as (id, log P) in descending order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Sent before the first Delta where `prompt_logprobs` asked for it: one for each prompt token but the first, or for
    each of those that were `given`."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly stable text of a generation, and the ids that completed it (their texts may come later), with their
    log-probabilities, divergences and projections where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()  # [tokens][profiles]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What a prompt's similarity to a profile's condition was (None: it was too short to tell), and whether it opened
    the gate."""

    similarity: float | None
    opened: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """One mix of a request, from the drawing of token `from_token` of the completion on, and the positions at which
    the residual stream was shifted by it."""

    from_token: int
    mixture: Mixture
    steered_tokens: int


@dataclass(frozen=True, slots=True)
class SteeringChange:
    """From where a changed steering holds: tokens of the completion before `from_token` were drawn under the one
    before, and the keys and values of positions before `position` (in prompt and completion) stay as they are."""

    from_token: int
    position: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of every accepted request.

    `steered_tokens` counts the positions at which the residual stream was shifted; `cached_tokens` the prompt tokens
    whose KV was reused. `error` is set for reason "error" only. `matched_stop` is the stop string or stop token id
    that ended the text (None for an end-of-sequence token). `segments` tells the mixes, one unless they changed.
    `ending` is the log-probability of an end-of-sequence or stop token, which is counted but in no Delta. `blamed` is
    the field of the request without which there would be no error; None for a fault of the model or the engine.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    steered_tokens: int
    error: str | None = None
    matched_stop: str | int | None = None
    segments: tuple[Segment, ...] = ()
    gates: Mapping[str, GateDecision] = field(default_factory=dict)  # by profile
    ending: tuple[TokenLogprob, ...] = ()  # one or none
    blamed: str | None = None


Event = PromptLogprobs | Delta | Finished


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters are totals since the start."""

    slots: int
    context: int
    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    steered_tokens: int
    cached_tokens: int  # of prompts, beside the `prompt_tokens` that were computed
    finished: Mapping[str, int]  # by reason
    path: str  # how the model is run: "batched" or a fallback


class EventStream(Protocol):
    """The events of one request, an async iterator. `aclose` (or dropping it) cancels what has not finished."""

    def __aiter__(self) -> EventStream: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """One model behind one thread. Methods may be called from the event loop only, and never block it."""

    @property
    def language_model(self) -> LanguageModel: ...

    @property
    def context(self) -> int:
        """The most tokens that prompt and completion may have together."""
        ...

    async def compile(self, constraint: Constraint) -> Grammar:
        """Make a constraint ready, beside the event loop. Raises RequestError if it cannot be followed, Overloaded if
        too many wait for that, Unavailable if the engine is closed."""
        ...

    def generate(self, request: GenerationRequest) -> EventStream:
        """Accept a request and iterate over its events: any number of Delta, then one Finished.

        Validation happens in the call itself: raises RequestError for an empty or overlong prompt or an unknown token
        id, or `ignore_eos` with a grammar, ProfileMismatch for a profile of another model, Overloaded if the queue is
        full, Unavailable if the engine is closed. Closing the iterator, or cancelling the task that iterates, cancels
        the request and frees its slot.
        """
        ...

    def set_steering(self, request_id: str, mixture: Mixture) -> Awaitable[SteeringChange]:
        """Change the mix of a live request from its next token on; what was scheduled later no longer happens.

        Raises in the call itself as `generate` does for a mix, UnknownGeneration for an id that never was (or ended
        long ago), Conflict for one that has ended, which the awaitable may raise too.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request with reason "cancelled"; False if it is not live."""
        ...

    def load_profile(self, profile: Profile) -> None:
        """Check that a profile fits this model, before it is served. Raises ProfileError or ProfileMismatch."""
        ...

    def unload_profile(self, profile: Profile) -> None:
        """Forget a version; requests that run with it keep it until they end."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Cancel what runs and stop the thread."""
        ...
