"""The parts of the running service that routes depend on, each refused with a 503 until it is loaded.

They are coroutines, because FastAPI runs plain functions in threads.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Request

from server.engines.protocol import Engine
from server.generation.intake import Intake
from server.generation.steering_grammar import EXAMPLE, HEADER
from server.profiles.registry import ProfileRegistry
from server.state import Service
from steering_vectors.errors import SteeringError


async def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]

SteeringHeader = Annotated[
    str | None,
    Header(
        alias=HEADER, description="A steering string, for clients that cannot add fields to a body.", examples=[EXAMPLE]
    ),
]


async def refuse_steering_header(request: Request) -> None:
    """For routes whose steering is in the body. Raises SteeringError."""
    if HEADER in request.headers:
        raise SteeringError(
            f"the header {HEADER} is not accepted here: put the steering into the body", param="steering"
        )


async def _engine(service: ServiceDep) -> Engine:
    return service.engine


async def _registry(service: ServiceDep) -> ProfileRegistry:
    return service.registry


async def _intake(service: ServiceDep) -> Intake:
    return Intake(service.engine, service.model_name, service.registry)


async def _model_name(service: ServiceDep) -> str:
    return service.model_name


EngineDep = Annotated[Engine, Depends(_engine)]
IntakeDep = Annotated[Intake, Depends(_intake)]
RegistryDep = Annotated[ProfileRegistry, Depends(_registry)]
ModelNameDep = Annotated[str, Depends(_model_name)]
