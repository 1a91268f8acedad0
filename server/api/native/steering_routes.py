"""PATCH /generations/{id} and POST /steering/resolve: change a running steering, and ask what one would do."""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired

from fastapi import APIRouter, Depends, Path
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import EngineDep, RegistryDep, refuse_steering_header
from server.api.document import declare
from server.api.fields.body import Body, Examples
from server.api.fields.steering import Steering
from server.engines.protocol import (
    MAX_SCHEDULE_TOKEN,
    BlockEffect,
    GenerationRequest,
    SteeringPlan,
    TermEffect,
    capabilities_needed,
)
from server.generation.client_errors import client_errors
from server.generation.intake import check_capabilities
from server.generation.receipts import EXAMPLE_RECEIPT, SteeringReceipt, applied_entry, segment_receipt
from server.generation.steering_grammar import pinned
from server.http.answers import about
from server.http.json_bodies import StrictRoute

GenerationId = Annotated[str, Path(description="The id from the generation's first event.", examples=["gen-c9f0f895"])]


class ChangeAnswer(TypedDict):
    """The answer to PATCH /generations/{id}."""

    id: Annotated[str, about("The generation.")]
    from_token: Annotated[int, about("The first completion token drawn under the new steering.")]
    position: Annotated[int, about("The first position, in prompt and completion, computed under it.")]
    steering: Annotated[list[SteeringReceipt], about("The steering from there on.")]


class ResolvedProfile(SteeringReceipt):
    """One profile of the mix."""

    method: Annotated[str, about("How the profile was made.")]
    unit: Annotated[float, about("The factor from strength to shift.")]
    max_strength: Annotated[float, about("Its safe range: ± this.")]
    kl_at_1: Annotated[float | None, about("The KL of strength 1, in nats per token; null if not calibrated.")]


class ResolvedBlock(TypedDict):
    """How far the whole mix shifts one block."""

    block: Annotated[int, about("The block.")]
    shift_norm: Annotated[float, about("The norm of the shift.")]
    residual_norm: Annotated[float | None, about("The median norm of the residual stream there, if known.")]
    norm_ratio: Annotated[float | None, about("`shift_norm` over `residual_norm`.")]


class ResolvedPoint(TypedDict):
    """The mix from one token on."""

    from_token: Annotated[int, about("The first completion token.")]
    strengths: Annotated[dict[str, float], about("By profile.")]


class ResolveAnswer(TypedDict):
    """The answer to POST /steering/resolve."""

    steering: Annotated[list[ResolvedProfile], about("The mix at the start.")]
    blocks: Annotated[list[ResolvedBlock], about("The blocks that it shifts.")]
    timeline: NotRequired[Annotated[list[ResolvedPoint], about("For a schedule: where the mix changes.")]]


EXAMPLE_CHANGE: ChangeAnswer = {"id": "gen-c9f0f895", "from_token": 17, "position": 31, "steering": [EXAMPLE_RECEIPT]}
EXAMPLE_RESOLVED: ResolveAnswer = {
    "steering": [{**EXAMPLE_RECEIPT, "method": "mean-diff", "unit": 4.6, "max_strength": 1.7, "kl_at_1": 0.1}],
    "blocks": [{"block": 5, "shift_norm": 48.0, "residual_norm": 129.4, "norm_ratio": 0.37}],
}


class ChangeBody(Body):
    """The body of PATCH /generations/{id}."""

    examples: ClassVar[Examples] = ({"steering": "warm@-0.5"},)

    steering: Steering = Field(description="The steering from the next token on; an empty list of profiles is none.")


class ResolveBody(Body):
    """The body of POST /steering/resolve."""

    examples: ClassVar[Examples] = ({"steering": "warm@0.8+concise@-0.3"},)

    steering: Steering = Field(description="The steering.")


router = APIRouter(tags=["steering"], route_class=StrictRoute, dependencies=[Depends(refuse_steering_header)])


@router.patch(
    "/generations/{generation_id}",
    summary="Change the steering of a running generation",
    response_model=None,
    responses=declare(ChangeAnswer, EXAMPLE_CHANGE, 400, 404, 409, 503),
)
async def change(
    generation_id: GenerationId, body: ChangeBody, engine: EngineDep, registry: RegistryDep
) -> ChangeAnswer:
    """Change the steering of a running generation from its next token on.

    The answer has the first completion token that is drawn under the new steering, and the first position whose keys
    and values are computed under it. Earlier ones stay as they are. The tokens of a schedule count from the change:
    token 0 is `from_token`.
    """
    with client_errors():
        plan = pinned(body.steering.plan(), registry.find)
        needed = capabilities_needed(GenerationRequest((generation_id,), (), plan=plan))
        check_capabilities(engine.info, {"live_steering": "steering", **needed})
        changed = await engine.set_steering(generation_id, plan)
    return {
        "id": generation_id,
        "from_token": changed.from_token,
        "position": changed.position,
        "steering": segment_receipt(changed.segment),
    }


@router.post(
    "/steering/resolve",
    summary="Look at a steering",
    response_model=None,
    responses=declare(ResolveAnswer, EXAMPLE_RESOLVED, 400, 404, 503),
)
async def resolve(body: ResolveBody, engine: EngineDep, registry: RegistryDep) -> ResolveAnswer:
    """Show what a steering would do, without generating: profile versions, blocks, and how far each is shifted."""
    with client_errors():
        plan = pinned(body.steering.plan(), registry.find)
        effect = await engine.explain(plan)
    answer: ResolveAnswer = {
        "steering": [_resolved(term, plan) for term in effect.terms],
        "blocks": [_block(block) for block in effect.blocks],
    }
    changes = plan.changes(MAX_SCHEDULE_TOKEN + 1)
    if len(changes) > 1:
        answer["timeline"] = [
            {"from_token": token, "strengths": {term.profile: term.at(token) for term in plan.terms}}
            for token in changes
        ]
    return answer


def _resolved(effect: TermEffect, plan: SteeringPlan) -> ResolvedProfile:
    return {
        **applied_entry(effect.applied, plan, effect.applied.term.at(0)),
        "method": effect.method,
        "unit": effect.unit,
        "max_strength": effect.max_strength,
        "kl_at_1": effect.kl_at_1,
    }


def _block(effect: BlockEffect) -> ResolvedBlock:
    usual = effect.residual_norm
    return {
        "block": effect.block,
        "shift_norm": effect.shift_norm,
        "residual_norm": usual,
        "norm_ratio": None if not usual else effect.shift_norm / usual,
    }
