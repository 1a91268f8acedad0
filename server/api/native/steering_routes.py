"""PATCH /generations/{id} and POST /steering/resolve: change a running steering, and ask what one would do."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, NotRequired

from fastapi import APIRouter, Depends, Path, Response
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import CallerDep, ReadyDep, refuse_steering_header
from server.api.document import declare
from server.api.fields.body import Body, Examples
from server.api.fields.steering import Steering
from server.engines.errors import UnknownGeneration
from server.engines.protocol import MAX_SCHEDULE_TOKEN, GenerationRequest, SteeringPlan, capabilities_needed
from server.generation.client_errors import client_errors
from server.generation.intake import check_capabilities
from server.generation.receipts import SteeringReceipt, applied_entry
from server.generation.steering_grammar import pinned
from server.http.answers import about, json_answer
from server.http.middleware import StrictRoute
from server.observability import request_record
from server.profiles.references import Draw

GenerationId = Annotated[str, Path(description="The id from the generation's first event.", examples=["gen-c9f0f895"])]


class ChangeAnswer(TypedDict):
    """The answer to PATCH /generations/{id}."""

    id: Annotated[str, about("The generation.", "gen-c9f0f895")]
    from_token: Annotated[int, about("The first completion token drawn under the new steering.", 17)]
    position: Annotated[int, about("The first position, in prompt and completion, computed under it.", 31)]
    steering: Annotated[list[SteeringReceipt], about("The steering from there on.")]


class ResolvedProfile(SteeringReceipt):
    """One profile of the mix."""

    method: Annotated[str, about("How the profile was made.", "mean-diff")]
    unit: Annotated[float, about("The factor from strength to shift.", 4.6)]
    min_strength: Annotated[float, about("The lower end of its safe range.", -1.7)]
    max_strength: Annotated[float, about("The upper end of its safe range.", 1.7)]
    kl_at_1: Annotated[float | None, about("The KL of strength 1, in nats per token; null if not calibrated.", 0.1)]


class ResolvedBlock(TypedDict):
    """How far the whole mix shifts one block."""

    block: Annotated[int, about("The block.", 5)]
    shift_norm: Annotated[float, about("The norm of the shift.", 48.0)]
    residual_norm: Annotated[float | None, about("The median norm of the residual stream there, if known.", 129.4)]
    norm_ratio: Annotated[float | None, about("`shift_norm` over `residual_norm`.", 0.37)]


class ResolvedPoint(TypedDict):
    """The mix from one token on."""

    from_token: Annotated[int, about("The first completion token.")]
    strengths: Annotated[dict[str, float], about("By profile.")]


class ResolveAnswer(TypedDict):
    """The answer to POST /steering/resolve."""

    steering: Annotated[list[ResolvedProfile], about("The mix at the start.")]
    blocks: Annotated[list[ResolvedBlock], about("The blocks that it shifts.")]
    timeline: NotRequired[Annotated[list[ResolvedPoint], about("For a schedule: where the mix changes.")]]


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
    **declare(ChangeAnswer, 400, 404, 409, 503),
)
async def change(generation_id: GenerationId, body: ChangeBody, service: ReadyDep, caller: CallerDep) -> ChangeAnswer:
    """Change the steering of a running generation from its next token on.

    The answer has the first completion token that is drawn under the new steering, and the first position whose keys
    and values are computed under it. Earlier ones stay as they are. The tokens of a schedule count from the change:
    token 0 is `from_token`. Only the key that began the generation can change it, or one with the scope `admin`.
    """
    with client_errors():
        if not caller.may_change(generation_id):
            raise UnknownGeneration(f"there is no generation {generation_id!r} here", param="id")
        registry, asked = service.registry, body.steering.plan()
        async with registry.holding(term.profile for term in asked.terms):
            draw = Draw(preferred=registry.used_by(generation_id))
            plan = pinned(asked, partial(registry.find, draw=draw))
            needed = capabilities_needed(GenerationRequest((generation_id,), (), plan=plan))
            check_capabilities(service.engine.info, {"live_steering": "steering", **needed})
            changed = await service.engine.set_steering(generation_id, plan)
            registry.use_too(generation_id, plan.versions)
    if (record := request_record.current()) is not None:
        record.change(plan)
    return {
        "id": generation_id,
        "from_token": changed.from_token,
        "position": changed.position,
        "steering": [applied_entry(one, plan, one.term.at(0)) for one in changed.segment.terms],
    }


@router.post("/steering/resolve", summary="Look at a steering", **declare(ResolveAnswer, 400, 404, 503))
async def resolve(body: ResolveBody, service: ReadyDep) -> Response:
    """Show what a steering would do, without generating: profile versions, blocks, and how far each is shifted."""
    with client_errors():
        asked = body.steering.plan()
        async with service.registry.holding(term.profile for term in asked.terms):
            plan = pinned(asked, service.registry.find)
            effect = await service.engine.explain(plan)
    answer: ResolveAnswer = {
        "steering": [
            {
                **applied_entry(term.applied, plan, term.applied.term.at(0)),
                "method": term.method,
                "unit": term.unit,
                "min_strength": term.safe_range[0],
                "max_strength": term.safe_range[1],
                "kl_at_1": term.kl_at_1,
            }
            for term in effect.terms
        ],
        "blocks": [
            {
                "block": one.block,
                "shift_norm": one.shift_norm,
                "residual_norm": one.residual_norm,
                "norm_ratio": one.shift_norm / one.residual_norm if one.residual_norm else None,
            }
            for one in effect.blocks
        ],
    }
    if any(term.schedule is not None for term in plan.terms):
        timeline = await service.encoding.run(lambda: _timeline(plan))
        if len(timeline) > 1:
            answer["timeline"] = timeline
    return await json_answer(lambda: answer, len(answer.get("timeline", ())) * len(plan.terms), service.encoding)


def _timeline(plan: SteeringPlan) -> list[ResolvedPoint]:
    return [
        {"from_token": token, "strengths": {term.profile: term.at(token) for term in plan.terms}}
        for token in plan.changes(MAX_SCHEDULE_TOKEN + 1)
    ]
