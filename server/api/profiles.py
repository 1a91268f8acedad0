"""GET /profiles: what is served, and what was rejected and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, cast

from fastapi import APIRouter, Path
from typing_extensions import TypedDict

from server.api.dependencies import RegistryDep
from server.api.document import declare
from server.generation.receipts import EXAMPLE_RECEIPT
from server.http.answers import about
from server.profiles.registry import ProfileEntry
from steering_vectors.profiles.files import profile_summary
from steering_vectors.profiles.profile import ApplyTo, Layering, Operator


class ListedProfile(TypedDict):
    """One profile of the list. A rejected one of which no version is served has `name`, `status` and `error` only."""

    name: Annotated[str, about("The profile's name, which is that of its file.")]
    status: Annotated[
        Literal["served", "rejected"],
        about("`rejected`: the newest file is invalid; the version before it may still be served."),
    ]
    error: NotRequired[Annotated[str, about("Why the newest file was rejected.")]]
    version: NotRequired[Annotated[str, about("The sha256 of the served file.")]]
    description: NotRequired[Annotated[str, about("What the profile does, as its author describes it.")]]
    method: NotRequired[Annotated[str, about("The method it was fitted with.")]]
    operator: NotRequired[Annotated[Operator, about("`add` shifts the residual stream; `ablate` removes a direction.")]]
    layering: NotRequired[Annotated[Layering, about("How the directions of several blocks combine.")]]
    layers: NotRequired[Annotated[list[int], about("The blocks that have a direction.")]]
    unit: NotRequired[Annotated[float, about("The factor from strength to shift, set by calibration.")]]
    max_strength: NotRequired[Annotated[float, about("The safe range: ± this.")]]
    created_at: NotRequired[Annotated[str, about("When it was created.")]]


class ProfileList(TypedDict):
    """Every file of the profile directory."""

    profiles: Annotated[list[ListedProfile], about("By name.")]


class ProfileModel(TypedDict):
    """The model that a profile was fitted on."""

    id: Annotated[str, about("Its name.")]
    architecture: Annotated[str, about("Its class in transformers.")]
    hidden_size: Annotated[int, about("The width of its residual stream.")]
    num_layers: Annotated[int, about("The number of its blocks.")]
    fingerprint: Annotated[str, about("A sha256 over shapes and a sample of weights.")]


class ProfileDetails(ListedProfile):
    """Everything about a profile except its vectors."""

    method_options: NotRequired[Annotated[dict[str, Any], about("The options of its method.")]]
    apply_to: NotRequired[Annotated[ApplyTo, about("Where it is meant to apply.")]]
    calibration: NotRequired[Annotated[dict[str, Any], about("How its unit and safe range were set, with the curve.")]]
    model: NotRequired[Annotated[ProfileModel, about("The model it was fitted on.")]]
    chat_template_sha256: NotRequired[
        Annotated[str | None, about("The sha256 of the chat template it was fitted with.")]
    ]
    data: NotRequired[Annotated[dict[str, Any], about("The preference data: source, rows, digest.")]]
    metrics: NotRequired[Annotated[dict[str, Any], about("Measurements made while fitting, and notes.")]]
    residual_norms: NotRequired[Annotated[dict[str, float], about("The median norm of the residual stream, by block.")]]
    direction_norms: NotRequired[Annotated[dict[str, float], about("The norms of its directions, by block.")]]
    trimtab_version: NotRequired[Annotated[str, about("The version of trimtab that made it.")]]


EXAMPLE_PROFILE: ListedProfile = {
    "name": "warm",
    "status": "served",
    "version": EXAMPLE_RECEIPT["version"],
    "description": "kind and encouraging; the opposite is cold",
    "method": "mean-diff",
    "operator": "add",
    "layering": "independent",
    "layers": [5],
    "unit": 4.627192848098149,
    "max_strength": 1.7,
    "created_at": "2026-11-21T01:17:32+00:00",
}
EXAMPLE_DETAILS: ProfileDetails = {
    **EXAMPLE_PROFILE,
    "method_options": {"tokens": "response", "seed": 0},
    "apply_to": "generated",
    "calibration": {"kl_budget": 0.1, "kl_at_1": 0.1002437291537019, "unreached": False},
    "model": {
        "id": "demo",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 192,
        "num_layers": 8,
        "fingerprint": "259400c1f3c080c53c239f2aa74f454c3034c7687c0041418b98d29ff06cff21",
    },
    "chat_template_sha256": "7c44bc3c15e16f4b547ba1c1f92cfbc1f60c5e22b9eebce835bf84def58dc421",
    "data": {"source": "warm.train.jsonl", "kind": "preference", "rows": 480},
    "metrics": {"notes": []},
    "residual_norms": {"5": 129.38165283203125},
    "direction_norms": {"5": 13.03648619923215},
    "trimtab_version": "0.1.0",
}

router = APIRouter(tags=["profiles"])


@router.get(
    "/profiles",
    summary="List the profiles",
    response_model=None,
    responses=declare(ProfileList, {"profiles": [EXAMPLE_PROFILE]}, 503),
)
async def profiles(registry: RegistryDep) -> ProfileList:
    """List every file of the profile directory. A rejected one may still be served in the version before it."""
    return {"profiles": [_listed(entry) for entry in registry.entries]}


@router.get(
    "/profiles/{name}",
    summary="Show one profile",
    response_model=None,
    responses=declare(ProfileDetails, EXAMPLE_DETAILS, 404, 503),
)
async def profile(
    name: Annotated[str, Path(description="A `name` of the list.", examples=["warm"])], registry: RegistryDep
) -> ProfileDetails:
    """Show everything about one profile except its vectors."""
    entry = registry.entry(name)
    more: Mapping[str, Any] = {} if entry.profile is None else profile_summary(entry.profile)
    return cast(ProfileDetails, {**_listed(entry), **more})


def _listed(entry: ProfileEntry) -> ListedProfile:
    listed: ListedProfile = {"name": entry.name, "status": entry.status}
    if entry.error is not None:
        listed["error"] = entry.error
    if (served := entry.profile) is None:
        return listed
    return {
        **listed,
        "version": served.version,
        "description": served.description,
        "method": served.method,
        "operator": served.operator,
        "layering": served.layering,
        "layers": list(served.layers),
        "unit": served.unit,
        "max_strength": served.max_strength,
        "created_at": served.created_at,
    }
