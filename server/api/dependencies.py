"""What routes depend on: the running service, who asks, and the header that steers.

The dependencies are coroutines, because FastAPI runs plain functions in threads.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.routing import APIRoute

from server.access.callers import Caller
from server.access.gate import CALLER
from server.generation.intake import Intake
from server.generation.steering_grammar import EXAMPLE, HEADER
from server.state import Service
from steering_vectors.errors import SteeringError

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


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


async def _ready(service: ServiceDep) -> Service:
    service.check_ready()
    return service


ReadyDep = Annotated[Service, Depends(_ready)]  # a 503 until everything is loaded, whatever the body


async def _caller(request: Request) -> Caller:
    caller: Caller = getattr(request.state, CALLER)
    return caller


CallerDep = Annotated[Caller, Depends(_caller)]


async def _intake(service: ReadyDep, caller: CallerDep) -> Intake:
    return service.intake(caller)


IntakeDep = Annotated[Intake, Depends(_intake)]


def generates(route: APIRoute) -> bool:
    """Whether a route runs generations."""
    return any(dependency.call is _intake for dependency in route.dependant.dependencies)
