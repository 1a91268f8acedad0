"""GET /profiles: what is served, what was refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path

from server.api.dependencies import RegistryDep
from server.api.document import declare
from server.api.native.responses import ProfileDetails, ProfileList
from server.profiles.registry import ProfileEntry
from steering_vectors.profiles.files import profile_summary

router = APIRouter(tags=["profiles"])

LISTED = ("version", "description", "method", "operator", "layering", "layers", "unit", "max_strength", "created_at")


@router.get("/profiles", summary="List the profiles", response_model=None, responses=declare(ProfileList, 503))
async def profiles(registry: RegistryDep) -> dict[str, list[dict[str, Any]]]:
    """Every file of the profile directory. A rejected one may still be served in the version before it."""
    return {"profiles": [_listed(entry) for entry in registry.entries]}


@router.get(
    "/profiles/{name}", summary="Show one profile", response_model=None, responses=declare(ProfileDetails, 404, 503)
)
async def profile(
    name: Annotated[str, Path(description="A `name` of the list.", examples=["warm"])], registry: RegistryDep
) -> dict[str, Any]:
    """All there is to know about one profile but its vectors."""
    entry = registry.entry(name)
    known: Mapping[str, Any] = profile_summary(entry.profile) if entry.profile is not None else {}
    return {**_state(entry), **known}


def _listed(entry: ProfileEntry) -> dict[str, Any]:
    served = entry.profile
    known = {name: getattr(served, name) for name in LISTED} if served is not None else {}
    return {**_state(entry), **known}


def _state(entry: ProfileEntry) -> dict[str, Any]:
    state = {"name": entry.name, "status": entry.status}
    return state if entry.error is None else {**state, "error": entry.error}
