"""The state of the server: whether it is up, whether it can serve, and what it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NotRequired

import torch
import transformers
from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from server.api.dependencies import CallerDep, ReadyDep, ServiceDep
from server.api.document import declare, declare_text
from server.http.answers import about
from server.observability.metrics import CONTENT_TYPE
from steering_vectors.profiles.files import installed_version

MAX_LISTED = 64  # rejected profiles


class Health(TypedDict):
    """The process answers."""

    status: Annotated[Literal["ok"], about("Always `ok`.")]


class Ready(TypedDict):
    """The server can serve."""

    status: Annotated[Literal["ready"], about("Always `ready`; until then, the answer is a 503.")]
    model: Annotated[str, about("The base model's name on /v1, without directories.", "demo")]
    profiles: Annotated[int, about("The number of served profiles.", 4)]
    rejected: NotRequired[
        Annotated[list[str], about("The names of rejected files, if there are any; `GET /profiles` says why.")]
    ]
    profiles_error: NotRequired[
        Annotated[
            str, about("Why the profile directory cannot be read, if it cannot. Profiles that were served stay served.")
        ]
    ]


class Version(TypedDict):
    """Versions and settings. Those of libraries are for callers with the scope `admin`, or for all without keys."""

    version: Annotated[str, about("The version of trimtab.", "0.1.0")]
    torch: NotRequired[Annotated[str, about("The version of PyTorch.", "2.13.0")]]
    transformers: NotRequired[Annotated[str, about("The version of transformers.", "5.23.0")]]
    model: Annotated[str, about("The setting `--served-model-name`, else `--model` without directories.", "demo")]
    dtype: Annotated[str, about("The setting `--dtype`.", "auto")]
    quantize: Annotated[Literal["int8", "int4", "gguf"] | None, about("The setting `--quantize`.")]
    device: Annotated[str, about("The setting `--device`.", "cpu")]


METRICS_EXAMPLE = """\
# HELP trimtab_num_requests_running Generations that have a slot.
# TYPE trimtab_num_requests_running gauge
trimtab_num_requests_running 3.0
"""

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Is it alive?", **declare(Health, 503))
async def health(service: ServiceDep) -> Health:
    """Answer 200 as long as the process can go on, also while it loads the model; 503 if its engine has failed or
    hangs, so that it must be restarted."""
    service.check_alive()
    return {"status": "ok"}


@router.get("/ready", summary="Can it serve?", **declare(Ready, 503))
async def ready(service: ReadyDep) -> Ready:
    """Answer 200 once the model and every profile are loaded. The answer is 503 before that, while the server drains,
    and if its engine has failed or hangs."""
    service.check_accepting()
    registry = service.registry
    answer: Ready = {"status": "ready", "model": _shown(service.model_name), "profiles": len(registry.served)}
    if rejected := registry.rejected:
        answer["rejected"] = rejected[:MAX_LISTED]
    if registry.problem is not None:
        answer["profiles_error"] = registry.problem
    return answer


@router.get("/metrics", summary="How is it doing?", response_class=Response, **declare_text(METRICS_EXAMPLE))
async def metrics(service: ServiceDep) -> Response:
    """Show the metrics for Prometheus, in its text format. docs/observability.md lists them."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)


@router.get("/version", summary="What does it run?", **declare(Version))
async def version(service: ServiceDep, caller: CallerDep) -> Version:
    """Show versions and settings, also while the model is loading."""
    settings = service.settings
    found: Version = {
        "version": installed_version(),
        "model": _shown(settings.served_model_name or settings.model),
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "device": settings.device,
    }
    if caller.is_admin:
        found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return found


def _shown(model: str) -> str:
    """A model's name without its directories, which are nobody's business; hub ids stay whole."""
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model
