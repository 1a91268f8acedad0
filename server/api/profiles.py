"""The routes that show profiles: what is served, what was rejected and why, versions, files and the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Required, cast

from fastapi import APIRouter, Path, Query, Response
from typing_extensions import TypedDict

from server.api.dependencies import ReadyDep
from server.api.document import FILE, declare, declare_file
from server.generation.receipts import EXAMPLE_SHA256
from server.http.answers import about
from server.profiles.directory_changes import ListedVersion
from server.profiles.registry import ProfileEntry
from server.profiles.versions import Record
from steering_vectors.profiles.files import SUFFIX, profile_summary
from steering_vectors.profiles.profile import ApplyTo, Layering, Operator

MAX_CHANGES = 1000
EXAMPLE_TIME = "2026-11-21T01:17:32+00:00"


class ProfileAlias(TypedDict):
    """A name of a version, used as NAME#ALIAS. Plain names mean the version of `stable`, if there is one."""

    version: Annotated[str, about("The sha256 of the version's file.", EXAMPLE_SHA256)]
    share: Annotated[float, about("The part of the requests for the plain name that get this version, 0 to 1.", 0.1)]


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
    created_at: Annotated[str, about("When it was created.", EXAMPLE_TIME)]
    aliases: Annotated[dict[str, ProfileAlias], about("The aliases of its versions, if it has any.")]


class ProfileList(TypedDict):
    """Every file of the profile directory."""

    profiles: Annotated[list[ListedProfile], about("By name.")]
    error: NotRequired[
        Annotated[str, about("Present if the directory cannot be read now: why. What was served stays served.")]
    ]


class ProfileVersion(TypedDict):
    """One version of a profile."""

    version: Annotated[str, about("The sha256 of its file.", EXAMPLE_SHA256)]
    current: Annotated[bool, about("Whether it is the profile's file, which NAME#latest means.", True)]
    shipped: Annotated[bool, about("Whether it comes with trimtab.", False)]
    aliases: Annotated[list[str], about("Its aliases.", ["stable"])]
    in_use: Annotated[int, about("The number of running generations of this server that use it.", 0)]
    size: NotRequired[Annotated[int, about("The bytes of its file.", 6512)]]
    published_at: NotRequired[Annotated[str, about("When it became current, the last time.", EXAMPLE_TIME)]]
    published_by: NotRequired[
        Annotated[str, about("The name of the key, or the address; absent for files put into the directory.", "team")]
    ]


class ProfileVersions(TypedDict):
    """The versions of a profile that can be used."""

    name: Annotated[str, about("The profile.", "warm")]
    versions: Annotated[list[ProfileVersion], about("The latest publication first.")]


class AuditEntry(TypedDict):
    """One change of a profile."""

    at: Annotated[str, about("When it was made.", EXAMPLE_TIME)]
    action: Annotated[
        str,
        about(
            "`upload`, `delete`, `rollback`, `alias`, `unalias` or `delete_version` by a request; `refine`, `promote`, "
            "`settle`, `withdraw` or `rollback` by `trimtab refine` and its trial; `found` or `removed` for a file of "
            "the directory; with the ending `_failed` for one that could not be carried out after all.",
            "upload",
        ),
    ]
    profile: Annotated[str, about("The profile.", "warm")]
    from_version: NotRequired[Annotated[str, about("The version before it.")]]
    to_version: NotRequired[Annotated[str, about("The version after it.", EXAMPLE_SHA256)]]
    key: NotRequired[Annotated[str, about("The name of the key that made it.", "team")]]
    address: NotRequired[Annotated[str, about("The address that it came from.", "127.0.0.1")]]
    request_id: NotRequired[Annotated[str, about("The id of the request.", "req-0b95f3c2")]]
    alias: NotRequired[Annotated[str, about("The alias that was changed.")]]
    share: NotRequired[Annotated[float, about("Its share.")]]
    size: NotRequired[Annotated[int, about("The bytes of the file.")]]
    reason: NotRequired[Annotated[str, about("Why a candidate was made, promoted, withdrawn or rolled back.")]]
    figures: NotRequired[Annotated[dict[str, Any], about("What was measured for it.")]]
    error: NotRequired[Annotated[str, about("Why it could not be carried out.")]]


class AuditAnswer(TypedDict):
    """The latest changes."""

    changes: Annotated[list[AuditEntry], about("The newest first.")]


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


OF_ENTRY = ("name", "status", "error", "aliases")  # the other fields are those of the profile
OF_SERVED = [field for field in ListedProfile.__annotations__ if field not in OF_ENTRY]

ProfileName = Annotated[str, Path(description="A `name` of the list.", examples=["warm"])]

router = APIRouter(tags=["profiles"])


@router.get("/profiles", summary="List the profiles", **declare(ProfileList, 503))
async def profiles(service: ReadyDep) -> ProfileList:
    """List every file of the profile directory. A rejected one may still be served in the version before it."""
    registry = service.registry
    answer: ProfileList = {"profiles": [listed(entry, registry.record(entry.name)) for entry in registry.entries]}
    if registry.problem is not None:
        answer["error"] = registry.problem
    return answer


@router.get("/profiles/{name}", summary="Show one profile", **declare(ProfileDetails, 404, 503))
async def profile(name: ProfileName, service: ReadyDep, response: Response) -> ProfileDetails:
    """Show everything about one profile except its vectors. The header `etag` has its version."""
    entry = service.registry.entry(name)
    if entry.profile is not None:
        response.headers["etag"] = etag(entry.profile.version)
    return details(entry, service.registry.record(name))


@router.get(
    "/profiles/{name}/file", summary="Download a profile", response_class=Response, **declare_file(400, 404, 503)
)
async def profile_file(
    name: ProfileName,
    service: ReadyDep,
    version: Annotated[
        str | None, Query(description="A version or an alias; by default the current version.", examples=["stable"])
    ] = None,
) -> Response:
    """Download the file of a profile, or of a version of it that is kept. The header `etag` has the version."""
    found, data = await service.changes.file(name, version)
    headers = {"etag": etag(found), "content-disposition": f'attachment; filename="{name}{SUFFIX}"'}
    return Response(data, media_type=FILE, headers=headers)


@router.get("/profiles/{name}/versions", summary="List a profile's versions", **declare(ProfileVersions, 400, 404, 503))
async def profile_versions(name: ProfileName, service: ReadyDep) -> ProfileVersions:
    """List the versions of a profile that can be used, as NAME#SHA8, also after it was deleted."""
    return {"name": name, "versions": [_version(one) for one in await service.changes.versions(name)]}


@router.get("/audit", summary="Who has changed profiles?", **declare(AuditAnswer, 400, 503))
async def audit(
    service: ReadyDep,
    profile: Annotated[
        str | None, Query(description="The profile; by default all.", examples=["warm"], max_length=64)
    ] = None,
    limit: Annotated[int, Query(description="The maximum number of changes.", ge=1, le=MAX_CHANGES)] = 100,
) -> AuditAnswer:
    """Show the latest changes of profiles: who has changed what, when, and from which version to which."""
    fields = AuditEntry.__annotations__
    found = await service.changes.log(limit, profile)
    entries = [{name: value for name, value in entry.items() if name in fields} for entry in found]
    return {"changes": [cast(AuditEntry, entry) for entry in entries]}


def etag(version: str) -> str:
    return f'"{version}"'


def details(entry: ProfileEntry, record: Record) -> ProfileDetails:
    more: Mapping[str, Any] = {} if entry.profile is None else profile_summary(entry.profile)
    return cast(ProfileDetails, {**listed(entry, record), **more})


def listed(entry: ProfileEntry, record: Record) -> ListedProfile:
    found: dict[str, Any] = {"name": entry.name, "status": entry.status}
    if entry.error is not None:
        found["error"] = entry.error
    if entry.profile is not None:
        found |= {field: getattr(entry.profile, field) for field in OF_SERVED}
        found["min_strength"] = entry.profile.safe_range[0]
    if record.aliases:
        found["aliases"] = {
            alias: {"version": one.version, "share": one.share} for alias, one in sorted(record.aliases.items())
        }
    return cast(ListedProfile, found)


def _version(one: ListedVersion) -> ProfileVersion:
    found: ProfileVersion = {
        "version": one.version,
        "current": one.current,
        "shipped": one.shipped,
        "aliases": list(one.aliases),
        "in_use": one.in_use,
    }
    if one.published is not None:
        found |= {"size": one.published.size, "published_at": one.published.at}
        if one.published.by is not None:
            found["published_by"] = one.published.by
    return found
