"""The routes that change profiles: upload, delete, rollback and aliases. They need the scope `admin`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import CallerDep, ReadyDep
from server.api.document import CHANGING, declare, file_body
from server.api.fields.body import Body, Examples, Short
from server.api.profiles import ProfileAlias, ProfileDetails, ProfileName, details, etag
from server.generation.receipts import EXAMPLE_SHA256
from server.http.answers import about
from server.http.middleware import StrictRoute
from server.observability import request_record
from server.profiles.audit import Author
from server.profiles.directory_changes import Conditions
from server.state import Service

UPLOAD = "the profile's file, as `trimtab fit` writes it. The name in its metadata must be that of the path."
ABOUT_VERSION = "A version that is kept, or at least the first 8 digits of it."

AliasName = Annotated[
    str, Path(description="The alias; `stable` is what the plain name means.", examples=["stable", "canary"])
]
VersionText = Annotated[str, Path(description=ABOUT_VERSION, examples=[EXAMPLE_SHA256[:8]])]


class DeletedProfile(TypedDict):
    """The answer to DELETE /profiles/{name}."""

    name: Annotated[str, about("The profile.", "warm")]
    version: Annotated[str, about("The version that was deleted; it is kept for a rollback.", EXAMPLE_SHA256)]
    served: Annotated[str | None, about("The version of the shipped profile that is served again, if there is one.")]


class DeletedVersion(TypedDict):
    """The answer to DELETE /profiles/{name}/versions/{version}."""

    name: Annotated[str, about("The profile.", "warm")]
    version: Annotated[str, about("The version that was deleted.", EXAMPLE_SHA256)]


class ChangedAlias(ProfileAlias):
    """An alias that was set or deleted."""

    name: Annotated[str, about("The profile.", "warm")]
    alias: Annotated[str, about("The alias.", "canary")]


class RollbackBody(Body):
    """The body of POST /profiles/{name}/rollback, which may be empty: {}."""

    examples: ClassVar[Examples] = ({"version": EXAMPLE_SHA256[:8]},)

    version: Short | None = Field(None, description=f"{ABOUT_VERSION} By default the one before the current one.")


class AliasBody(Body):
    """The body of PUT /profiles/{name}/aliases/{alias}."""

    examples: ClassVar[Examples] = ({"share": 0.1},)

    version: Short | None = Field(
        None, description=f"{ABOUT_VERSION} An alias stands for its version. By default the current version."
    )
    share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="The part of the requests for the plain name that get this version; by default what it was, and 0 "
        "for a new alias.",
    )


async def _conditions(
    if_match: Annotated[
        str | None,
        Header(
            description="Change the profile only if this is its current version, or only if it exists (*).",
            examples=[f'"{EXAMPLE_SHA256}"'],
        ),
    ] = None,
    if_none_match: Annotated[
        str | None, Header(description="Change the profile only if it does not exist (*).", examples=["*"])
    ] = None,
) -> Conditions:
    return Conditions(if_match, if_none_match)


async def _author(caller: CallerDep) -> Author:
    record = request_record.current()
    if record is None:
        return Author(key=caller.name or None)
    return Author(caller.name or None, record.client, record.id)


ConditionsDep = Annotated[Conditions, Depends(_conditions)]
AuthorDep = Annotated[Author, Depends(_author)]

router = APIRouter(tags=["profiles"], route_class=StrictRoute)


@router.put(
    "/profiles/{name}",
    summary="Upload a profile",
    openapi_extra=file_body(UPLOAD),
    **declare(ProfileDetails, *CHANGING, creates=True),
)
async def upload(
    name: ProfileName, request: Request, service: ReadyDep, conditions: ConditionsDep, author: AuthorDep
) -> Response:
    """Publish a profile, or replace it. The file is checked, also by the engine, before it is published, and a refused
    one changes nothing. The version that it replaces is kept. A file with the name of a shipped profile takes its
    place. The answer is a 201 for a new name. The header `etag` has the version."""
    change = await service.changes.upload(name, request.stream(), conditions, author)
    return _entry(service, name, 201 if change.before is None else 200)


@router.delete("/profiles/{name}", summary="Delete a profile", **declare(DeletedProfile, *CHANGING))
async def delete(name: ProfileName, service: ReadyDep, conditions: ConditionsDep, author: AuthorDep) -> DeletedProfile:
    """Withdraw a profile: delete its file and its aliases. Running generations go on. The version is kept for a
    rollback. A shipped profile of the name is served again; a shipped profile itself cannot be deleted (409)."""
    change = await service.changes.delete(name, conditions, author)
    return {"name": name, "version": change.before or "", "served": change.after}


@router.post("/profiles/{name}/rollback", summary="Go back to an earlier version", **declare(ProfileDetails, *CHANGING))
async def rollback(
    name: ProfileName,
    service: ReadyDep,
    conditions: ConditionsDep,
    author: AuthorDep,
    body: RollbackBody,
) -> Response:
    """Make a version current again that was replaced or deleted. A second rollback without a version undoes the first.
    Aliases stay where they are."""
    await service.changes.rollback(name, body.version, conditions, author)
    return _entry(service, name, 200)


@router.delete(
    "/profiles/{name}/versions/{version}", summary="Delete a version that is kept", **declare(DeletedVersion, *CHANGING)
)
async def delete_version(
    name: ProfileName, version: VersionText, service: ReadyDep, conditions: ConditionsDep, author: AuthorDep
) -> DeletedVersion:
    """Delete a version that was replaced, to free its space. One that is current, in use or has an alias is a 409."""
    return {"name": name, "version": await service.changes.delete_version(name, version, conditions, author)}


@router.put("/profiles/{name}/aliases/{alias}", summary="Set an alias", **declare(ChangedAlias, *CHANGING))
async def set_alias(
    name: ProfileName,
    alias: AliasName,
    body: AliasBody,
    service: ReadyDep,
    conditions: ConditionsDep,
    author: AuthorDep,
) -> ChangedAlias:
    """Give a version of a profile another name, for requests that name NAME#ALIAS. The version is kept as long as it
    has an alias. With `stable`, the plain name means that version instead of the latest. With a share, such as 0.1 for
    `canary`, this part of the requests for the plain name get the alias' version; requests of one `user` always get
    the same. Receipts have the version."""
    made = await service.changes.set_alias(name, alias, body.version, body.share, conditions, author)
    return {"name": name, "alias": alias, "version": made.version, "share": made.share}


@router.delete("/profiles/{name}/aliases/{alias}", summary="Delete an alias", **declare(ChangedAlias, *CHANGING))
async def delete_alias(
    name: ProfileName, alias: AliasName, service: ReadyDep, conditions: ConditionsDep, author: AuthorDep
) -> ChangedAlias:
    """Delete an alias. Its version stays."""
    gone = await service.changes.delete_alias(name, alias, conditions, author)
    return {"name": name, "alias": alias, "version": gone.version, "share": gone.share}


def _entry(service: Service, name: str, status: int) -> Response:
    entry = service.registry.entry(name)
    headers = {} if entry.profile is None else {"etag": etag(entry.profile.version)}
    return JSONResponse(details(entry, service.registry.record(name)), status, headers)
