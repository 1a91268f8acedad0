"""What routes ask for by type: the parts of the running service, each refused with a 503 until it is there.

They are coroutines because FastAPI runs plain functions in threads, and all of this belongs to the event loop.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Request

from server.engines.protocol import Engine
from server.generation.steering_grammar import EXAMPLE, HEADER
from server.http.error_responses import ErrorReporter
from server.profiles.registry import ProfileRegistry
from server.state import Service
from steering_vectors.errors import SteeringError


async def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def _reporter(request: Request) -> ErrorReporter:
    reporter = request.app.state.reporter
    assert isinstance(reporter, ErrorReporter)
    return reporter


ServiceDep = Annotated[Service, Depends(_service)]
ReporterDep = Annotated[ErrorReporter, Depends(_reporter)]


SteeringHeader = Annotated[
    str | None,
    Header(
        alias=HEADER, description="A steering string, for clients that cannot add fields to a body.", examples=[EXAMPLE]
    ),
]


async def refuse_steering_header(request: Request) -> None:
    """For routes whose bodies say what steers. Raises SteeringError."""
    if HEADER in request.headers:
        raise SteeringError(
            f"the header {HEADER} does not steer here: leave it out, and say in the body what steers", param="steering"
        )


async def _engine(service: ServiceDep) -> Engine:
    return service.engine


async def _registry(service: ServiceDep) -> ProfileRegistry:
    return service.registry


async def _model_name(service: ServiceDep) -> str:
    return service.model_name


EngineDep = Annotated[Engine, Depends(_engine)]
RegistryDep = Annotated[ProfileRegistry, Depends(_registry)]
ModelNameDep = Annotated[str, Depends(_model_name)]
