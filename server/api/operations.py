"""Whether the server is up, whether it can serve, and what it is."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from fastapi import APIRouter

from server.api.dependencies import ModelNameDep, RegistryDep, ServiceDep
from server.api.document import declare
from server.api.native.responses import Health, Ready, Version
from steering_vectors.profiles.files import installed_version

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Is it alive?", response_model=None, responses=declare(Health))
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/ready", summary="Can it serve?", response_model=None, responses=declare(Ready, 503))
async def ready(model: ModelNameDep, registry: RegistryDep) -> dict[str, Any]:
    """200 once the model and every profile are loaded, 503 before."""
    return {"status": "ready", "model": model, "profiles": len(registry.served)}


@router.get("/version", summary="What runs here?", response_model=None, responses=declare(Version))
async def version(service: ServiceDep) -> dict[str, Any]:
    """What runs here; also answered while the model is being loaded."""
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
