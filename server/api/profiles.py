"""GET /profiles: what is served, and what was rejected and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Required, cast

from fastapi import APIRouter, Path
from typing_extensions import TypedDict

from server.api.dependencies import ReadyDep
from server.api.document import declare
from server.generation.receipts import EXAMPLE_SHA256
from server.http.answers import about
from server.profiles.registry import ProfileEntry
from steering_vectors.profiles.files import profile_summary
from steering_vectors.profiles.profile import ApplyTo, Layering, Operator


class ListedProfile(TypedDict, total=False):
    """One profile of the list. A rejected one of which no version is served has `name`, `status` and `error` only."""

    name: Required[Annotated[str, about("The profile's name, which is that of its file.", "warm")]]
    status: Required[
        Annotated[
            Literal["served", "rejected"],
            about("`rejected`: the newest file is invalid; the version before it may still be served."),
        ]
    ]
    error: Annotated[str, about("Why the newest file was rejected.")]
    version: Annotated[str, about("The sha256 of the served file.", EXAMPLE_SHA256)]
    description: Annotated[str, about("What the profile does, as its author describes it.", "kind and encouraging")]
    method: Annotated[str, about("The method it was fitted with.", "mean-diff")]
    operator: Annotated[Operator, about("`add` shifts the residual stream; `ablate` removes a direction.", "add")]
    layering: Annotated[Layering, about("How the directions of several blocks combine.", "independent")]
    layers: Annotated[list[int], about("The blocks that have a direction.", [5])]
    unit: Annotated[float, about("The factor from strength to shift, set by calibration.", 4.627192848098149)]
    max_strength: Annotated[float, about("The upper end of the safe range.", 1.7)]
    min_strength: Annotated[float, about("The lower end of the safe range.", -1.7)]
    created_at: Annotated[str, about("When it was created.", "2026-11-21T01:17:32+00:00")]


class ProfileList(TypedDict):
    """Every file of the profile directory."""

    profiles: Annotated[list[ListedProfile], about("By name.")]
    error: NotRequired[
        Annotated[str, about("Present if the directory cannot be read now: why. What was served stays served.")]
    ]


class ProfileModel(TypedDict):
    """The model that a profile was fitted on."""

    id: Annotated[str, about("Its name.")]
    architecture: Annotated[str, about("Its class in transformers.")]
    hidden_size: Annotated[int, about("The width of its residual stream.")]
    num_layers: Annotated[int, about("The number of its blocks.")]
    fingerprint: Annotated[str, about("A sha256 over shapes and a sample of weights.")]


EXAMPLE_CALIBRATION = {"kl_budget": 0.1, "kl_at_1": 0.1002437291537019, "unreached": False}
EXAMPLE_TEMPLATE = "7c44bc3c15e16f4b547ba1c1f92cfbc1f60c5e22b9eebce835bf84def58dc421"
EXAMPLE_DATA = {"source": "warm.train.jsonl", "kind": "preference", "rows": 480}
EXAMPLE_MODEL: ProfileModel = {
    "id": "demo",
    "architecture": "LlamaForCausalLM",
    "hidden_size": 192,
    "num_layers": 8,
    "fingerprint": "259400c1f3c080c53c239f2aa74f454c3034c7687c0041418b98d29ff06cff21",
}


class ProfileDetails(ListedProfile, total=False):
    """Everything about a profile except its vectors."""

    method_options: Annotated[dict[str, Any], about("The options of its method.", {"tokens": "response", "seed": 0})]
    apply_to: Annotated[ApplyTo, about("Where it is meant to apply.", "generated")]
    calibration: Annotated[
        dict[str, Any], about("How its unit and safe range were set, with the curve.", EXAMPLE_CALIBRATION)
    ]
    model: Annotated[ProfileModel, about("The model it was fitted on.", EXAMPLE_MODEL)]
    chat_template_sha256: Annotated[
        str | None, about("The sha256 of the chat template it was fitted with.", EXAMPLE_TEMPLATE)
    ]
    data: Annotated[dict[str, Any], about("The preference data: source, rows, digest.", EXAMPLE_DATA)]
    metrics: Annotated[dict[str, Any], about("Measurements made while fitting, and notes.", {"notes": []})]
    gate: Annotated[dict[str, Any], about("Of a profile with a gate: its block, threshold, side and F1.")]
    residual_norms: Annotated[
        dict[str, float], about("The median norm of the residual stream, by block.", {"5": 129.4})
    ]
    direction_norms: Annotated[dict[str, float], about("The norms of its directions, by block.", {"5": 13.0})]
    trimtab_version: Annotated[str, about("The version of trimtab that made it.", "0.1.0")]


OF_SERVED = [field for field in ListedProfile.__annotations__ if field not in ("name", "status", "error")]

router = APIRouter(tags=["profiles"])


@router.get("/profiles", summary="List the profiles", **declare(ProfileList, 503))
async def profiles(service: ReadyDep) -> ProfileList:
    """List every file of the profile directory. A rejected one may still be served in the version before it."""
    answer: ProfileList = {"profiles": [_listed(entry) for entry in service.registry.entries]}
    if service.registry.problem is not None:
        answer["error"] = service.registry.problem
    return answer


@router.get("/profiles/{name}", summary="Show one profile", **declare(ProfileDetails, 404, 503))
async def profile(
    name: Annotated[str, Path(description="A `name` of the list.", examples=["warm"])], service: ReadyDep
) -> ProfileDetails:
    """Show everything about one profile except its vectors."""
    entry = service.registry.entry(name)
    more: Mapping[str, Any] = {} if entry.profile is None else profile_summary(entry.profile)
    return cast(ProfileDetails, {**_listed(entry), **more})


def _listed(entry: ProfileEntry) -> ListedProfile:
    listed: dict[str, Any] = {"name": entry.name, "status": entry.status}
    if entry.error is not None:
        listed["error"] = entry.error
    if entry.profile is not None:
        listed |= {field: getattr(entry.profile, field) for field in OF_SERVED}
        listed["min_strength"] = entry.profile.safe_range[0]
    return cast(ListedProfile, listed)
