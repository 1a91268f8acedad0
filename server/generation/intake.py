"""From what a body asks for to generations of the engine, the same way for every route.

Counts and capabilities are checked before any work is done. Errors name the fields of the request.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from server.engines.protocol import (
    Capability,
    Constraint,
    ConstraintKind,
    Engine,
    EngineInfo,
    GenerationRequest,
    SamplingParameters,
    SteeringPlan,
    capabilities_needed,
)
from server.generation.choices import Generations
from server.generation.client_errors import client_errors
from server.generation.encoding import Encoding, Ids, Prompt, encode, encode_continuations
from server.generation.steering_grammar import pinned
from steering_vectors.errors import RequestError

if TYPE_CHECKING:
    from server.profiles.registry import ProfileRegistry

NOTHING_GENERATED = SamplingParameters(max_tokens=0)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for: `n` choices of each prompt under each plan.

    `plans` are by the request's field that holds each, and so are `constraints`, of which there may be one. If there
    are `completions`, they are scored and nothing is generated. `counted` is the field that errors name if there are
    too many generations.
    """

    prompts: Sequence[Prompt]
    encoding: Encoding
    plans: Mapping[str, SteeringPlan]
    sampling: SamplingParameters = NOTHING_GENERATED
    n: int = 1
    constraints: Mapping[str, tuple[ConstraintKind, str]] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    divergence: bool = False
    projections: bool = False
    completions: Sequence[str | list[int]] | None = None
    counted: str = "prompt"


class Asking(Protocol):
    """The body of a generating route."""

    def ask(self, served: str, header: str | None) -> Ask:
        """`served` is the name of the served model, `header` a steering string. Raises RequestError."""
        ...


@dataclass(frozen=True, slots=True)
class Intake:
    """Takes in requests for one engine, its name and the profiles that are served."""

    engine: Engine
    served: str
    registry: ProfileRegistry

    async def submit(self, body: Asking, header: str | None = None) -> Generations:
        """Have the engine run all generations of a request, or none. Raises RequestError, UnknownProfile, UnknownModel,
        Overloaded, Unavailable."""
        with client_errors():
            ask = body.ask(self.served, header)
        fields = _field_names(ask)
        with client_errors(fields):
            self._check_count(ask)
            constraint = _constraint(ask)
            self._check_capabilities(ask, constraint)
            prompts = await self._encoded(ask)
            plans = self._plans(ask)  # after the encoding: a profile may have been replaced meanwhile
            projected = _projected(ask, plans)
            requests = [_request(ask, plan, constraint, projected, *prompt) for prompt in prompts for plan in plans]
            return Generations(requests, await self.engine.submit(requests), fields)

    def _check_count(self, ask: Ask) -> None:
        count = len(ask.prompts) * len(ask.plans) * ask.n * (1 if ask.completions is None else len(ask.completions))
        capacity = self.engine.info.capacity
        if count > capacity:
            raise RequestError(
                f"{ask.counted}: {count} generations exceed the {capacity} that this server runs and queues at once: "
                "request fewer",
                param=ask.counted,
            )

    def _check_capabilities(self, ask: Ask, constraint: Constraint | None) -> None:
        plans = self._plans(ask)
        for plan in plans:
            draft = _request(ask, plan, constraint, _projected(ask, plans), (), 0 if ask.completions is None else 1)
            check_capabilities(self.engine.info, capabilities_needed(draft))

    def _plans(self, ask: Ask) -> list[SteeringPlan]:
        return [pinned(plan, partial(self.registry.find, param=field)) for field, plan in ask.plans.items()]

    async def _encoded(self, ask: Ask) -> list[tuple[Ids, int]]:
        """The ids of each prompt, with the number of them at the end that are scored."""
        info = self.engine.info
        found = [await encode(info.tokenizer, prompt, ask.encoding) for prompt in ask.prompts]
        if ask.completions is None:
            return [(ids, 0) for ids in found]
        (prompt,) = found
        completions = await encode_continuations(info.tokenizer, prompt, ask.completions, info.vocab_size)
        return [((*prompt, *completion), len(completion)) for completion in completions]


def check_capabilities(info: EngineInfo, needed: Mapping[Capability, str]) -> None:
    """Raise RequestError for the first field that needs something the engine cannot do."""
    for capability, param in needed.items():
        if capability not in info.capabilities:
            message = f"{param} is not supported by the {info.name} engine: leave it out"
            raise RequestError(message, param=param, code="not_supported")


def _constraint(ask: Ask) -> Constraint | None:
    if len(ask.constraints) > 1:
        first, second, *_ = ask.constraints
        raise RequestError(f"{first} and {second} are both given: use only one of them", param=second)
    return next((Constraint(kind, text) for kind, text in ask.constraints.values()), None)


def _field_names(ask: Ask) -> dict[str, str]:
    """This request's names of protocol fields, where they differ from the common ones."""
    prompt = {"prompt_ids": "messages", "prompt": "messages"} if isinstance(ask.prompts[0], tuple) else {}
    scored = "echo" if ask.completions is None else "completions"
    constraint = next(iter(ask.constraints), "constraint")
    return {**prompt, "constraint": constraint, "prompt_logprobs": scored, "scored_suffix": scored}


def _projected(ask: Ask, plans: Sequence[SteeringPlan]) -> tuple[str, ...]:
    """The versions whose projections are reported: those of all plans, so that variants can be compared."""
    return tuple(dict.fromkeys(version for plan in plans for version in plan.versions)) if ask.projections else ()


def _request(
    ask: Ask, plan: SteeringPlan, constraint: Constraint | None, projected: tuple[str, ...], prompt: Ids, scored: int
) -> GenerationRequest:
    prefix = "gen" if ask.completions is None else "score"
    return GenerationRequest(
        tuple(new_id(prefix) for _ in range(ask.n)),
        prompt,
        ask.sampling,
        plan,
        constraint,
        ask.logprobs,
        ask.prompt_logprobs,
        scored,
        ask.divergence,
        projected,
    )


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
