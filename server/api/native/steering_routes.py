"""Routes about steering itself: change that of a running generation, and tell what one would do."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Path

from server.api.dependencies import EngineDep, RegistryDep, refuse_steering_header
from server.api.document import declare
from server.api.native.requests import ChangeBody, ResolveBody
from server.api.native.steering_responses import ChangeAnswer, ResolveAnswer
from server.http.json_bodies import StrictRoute
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.steering.bank import shifts_in

GenerationId = Annotated[str, Path(description="As the first event told it.", examples=["gen-c9f0f895"])]

router = APIRouter(tags=["steering"], route_class=StrictRoute, dependencies=[Depends(refuse_steering_header)])


@router.patch(
    "/generations/{generation_id}",
    summary="Change the steering of a running generation",
    response_model=None,
    responses=declare(ChangeAnswer, 400, 404, 409, 503),
)
async def change(
    generation_id: GenerationId, body: ChangeBody, engine: EngineDep, registry: RegistryDep
) -> dict[str, Any]:
    """Steer a running generation otherwise from its next token on.

    The answer tells the first token of the completion that is drawn under the new steering, and the first position
    whose keys and values are made under it; what was computed before stays.
    """
    mixture = body.steering.wanted().resolve(registry.find)
    changed = await engine.set_steering(generation_id, mixture)
    return {
        "id": generation_id,
        "from_token": changed.from_token,
        "position": changed.position,
        "steering": mixture.receipt(0),
    }


@router.post(
    "/steering/resolve",
    summary="Tell what a steering would do",
    response_model=None,
    responses=declare(ResolveAnswer, 400, 404, 503),
)
async def resolve(body: ResolveBody, engine: EngineDep, registry: RegistryDep) -> dict[str, Any]:
    """What a steering would do, without generating: which versions, at which blocks, how far it shifts them."""
    timeline = body.steering.wanted().timeline(registry.find)
    mixture = timeline[0][1]
    for _, later in timeline:
        for term in later.terms:
            engine.load_profile(term.profile)
    answer: dict[str, Any] = {
        "steering": [
            {**entry, **_details(term)} for entry, term in zip(mixture.receipt(0), mixture.terms, strict=True)
        ],
        "blocks": _blocks(mixture, engine.language_model.dtype),
    }
    if len(timeline) > 1:
        answer["timeline"] = [
            {"from_token": token, "strengths": {term.profile.name: term.strength for term in later.terms}}
            for token, later in timeline
        ]
    return answer


def _details(term: Term) -> dict[str, Any]:
    profile = term.profile
    return {
        "method": profile.method,
        "unit": profile.unit,
        "max_strength": profile.max_strength,
        "kl_at_1": profile.calibration.get("kl_at_1"),
    }


def _blocks(mixture: Mixture, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of each block: the norm of the whole mix's shift, the usual norm of the residual there, and their ratio. Raises
    SteeringError for a shift that the model's dtype does not hold."""
    found = []
    for layer, shift in shifts_in(mixture, dtype).by_layer().items():
        usual = next((n for term in mixture.terms if (n := term.profile.residual_norms.get(layer))), None)
        norm = float(shift.double().norm())  # squares of what is finite may not be
        found.append(
            {
                "block": layer,
                "shift_norm": norm,
                "residual_norm": usual,
                "norm_ratio": None if not usual else norm / usual,
            }
        )
    return found
