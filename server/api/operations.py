"""The state of the server: whether it is up, whether it can serve, and what it runs."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

import torch
import transformers
from fastapi import APIRouter
from typing_extensions import TypedDict

from server.api.dependencies import ReadyDep, ServiceDep
from server.api.document import declare
from server.http.answers import about
from steering_vectors.profiles.files import installed_version

MAX_LISTED = 64  # rejected profiles


class Health(TypedDict):
    """The process answers."""

    status: Annotated[Literal["ok"], about("Always `ok`.")]


class Ready(TypedDict):
    """The server can serve."""

    status: Annotated[Literal["ready"], about("Always `ready`; until then, the answer is a 503.")]
    model: Annotated[str, about("The base model's name on /v1.", "demo")]
    profiles: Annotated[int, about("The number of served profiles.", 4)]
    rejected: NotRequired[
        Annotated[list[str], about("Present if files are rejected: their names; `GET /profiles` says why.")]
    ]
    profiles_error: NotRequired[
        Annotated[str, about("Present if the profile directory cannot be read: why. What was served stays served.")]
    ]


class Version(TypedDict):
    """Versions and settings."""

    version: Annotated[str, about("The version of trimtab.", "0.1.0")]
    torch: Annotated[str, about("The version of PyTorch.", "2.13.0")]
    transformers: Annotated[str, about("The version of transformers.", "5.23.0")]
    model: Annotated[str, about("The setting `--served-model-name`, else `--model`.", "demo")]
    dtype: Annotated[str, about("The setting `--dtype`.", "auto")]
    quantize: Annotated[Literal["int8", "int4", "gguf"] | None, about("The setting `--quantize`.")]
    device: Annotated[str, about("The setting `--device`.", "cpu")]


router = APIRouter(tags=["operations"])


@router.get("/health", summary="Is it alive?", **declare(Health, 503))
async def health(service: ServiceDep) -> Health:
    """Answer 200 as long as the process can go on, also while it loads the model; 503 if its engine has failed or
    hangs, so that it must be restarted."""
    service.check_alive()
    return {"status": "ok"}


@router.get("/ready", summary="Can it serve?", **declare(Ready, 503))
async def ready(service: ReadyDep) -> Ready:
    """Answer 200 once the model and every profile are loaded; 503 before, while the server drains before it stops, and
    if its engine has failed or hangs."""
    service.check_accepting()
    registry = service.registry
    answer: Ready = {"status": "ready", "model": service.model_name, "profiles": len(registry.served)}
    if rejected := registry.rejected:
        answer["rejected"] = rejected[:MAX_LISTED]
    if registry.problem is not None:
        answer["profiles_error"] = registry.problem
    return answer


@router.get("/version", summary="What does it run?", **declare(Version))
async def version(service: ServiceDep) -> Version:
    """Show versions and settings, also while the model is loading."""
    settings = service.settings
    return {
        "version": installed_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": settings.served_model_name or settings.model,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "device": settings.device,
    }
