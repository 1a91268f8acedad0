"""The application: its routes, middleware and lifespan."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from server.access.browsers import HostCheck, SecurityHeaders, allowed_hosts, with_cors
from server.access.budgets import Budgets
from server.access.gate import Gate, tenant_of
from server.access.keyring import KeyRing
from server.access.refusals import Refusals
from server.api import feedback_routes, job_routes, operations, profile_changes, profiles
from server.api.dependencies import generates
from server.api.document import DESCRIPTION, OTHER_ERRORS, TAGS, openapi_document
from server.api.native import generate, steering_routes
from server.api.openai import routes as openai
from server.engines.protocol import Engine
from server.http.direct import DirectRoutes
from server.http.error_responses import install_error_handlers
from server.http.middleware import PAGE_FILES, BodyLimit, RoomCheck
from server.observability.observe import ObserveRequests
from server.observability.traces import Traces, exporting_traces
from server.settings import Settings, refuse_mistyped_access, unknown_variables
from server.state import Service
from steering_vectors.profiles.files import installed_version

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

ROUTERS = (
    openai.router,
    generate.router,
    steering_routes.router,
    profiles.router,
    profile_changes.router,
    feedback_routes.router,
    job_routes.router,
    operations.router,
)
ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings, engine: Engine | None = None, *, tracer_provider: TracerProvider | None = None
) -> FastAPI:
    """An application for these settings. It begins to load the model when it is started; /ready says when it is done.

    A given engine is used instead of one built from the settings, and is the caller's to close. Traces go to a given
    provider, or to the endpoint of the settings. Raises ConfigurationError or KeyFileError if what decides about access
    is not usable.
    """
    refuse_mistyped_access(unknown_variables())
    app = FastAPIOffline(  # FastAPI's own pages load scripts from a CDN
        docs_url="/docs",
        redoc_url=None,
        static_url=PAGE_FILES,
        title="trimtab",
        version=installed_version(),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        swagger_ui_parameters={"validatorUrl": None},
        lifespan=_lifespan,
        responses=OTHER_ERRORS,
    )
    app.openapi = partial(openapi_document, app)  # type: ignore[method-assign]
    app.state.routes = ROUTES
    app.state.service = Service(settings, engine)
    app.state.traces = _traces(settings, tracer_provider)
    service: Service = app.state.service
    install_error_handlers(app, service.retry_after)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(DirectRoutes, routes={("POST", feedback_routes.GIVE_PATH): feedback_routes.give_directly})
    app.add_middleware(
        RoomCheck,
        paths={route.path for route in ROUTES if generates(route)},
        check=lambda scope: service.check_room(tenant_of(scope)),
        retry_after=service.retry_after,
    )
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        in_flight=service.bytes_in_flight,
        tenant_of=tenant_of,
        retry_after=service.retry_after,
    )
    _protect(app, settings)
    app.add_middleware(  # the last is the outermost: it also sees what the others refuse
        ObserveRequests,
        metrics=service.metrics,
        routes={route.path for route in ROUTES},
        log_prompts=settings.log_prompts,
        traces=app.state.traces,
    )
    _admit_origins(app, settings)
    return app


def _protect(app: FastAPI, settings: Settings) -> None:
    """Add the checks of access, the outermost last."""
    refusals = app.state.refusals = Refusals()
    keys = KeyRing(settings.api_key_file, settings.api_key)
    app.state.budgets = Budgets(settings, app.state.service.retry_after)
    app.add_middleware(Gate, keys=keys, budgets=app.state.budgets, refusals=refusals)
    hosts = allowed_hosts(settings)
    if hosts is not None:
        app.add_middleware(HostCheck, allowed=hosts, refusals=refusals)
    app.add_middleware(SecurityHeaders)


def _admit_origins(app: FastAPI, settings: Settings) -> None:
    """Add CORS around everything, Starlette's own answer to an unexpected error too."""
    if settings.allowed_origins:
        build = app.build_middleware_stack
        app.build_middleware_stack = lambda: with_cors(build(), settings.allowed_origins)  # type: ignore[method-assign]


def _traces(settings: Settings, provider: TracerProvider | None) -> Traces | None:
    if provider is not None:
        return Traces(provider)
    endpoint = settings.otlp_traces_endpoint
    return None if endpoint is None else exporting_traces(endpoint)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    for name in unknown_variables():
        logger.warning("the environment variable %s is not a setting of this server", name)
    service: Service = app.state.service
    service.start()
    try:
        yield
    finally:
        await service.close()
        await app.state.budgets.close()
        if app.state.traces is not None:
            await asyncio.to_thread(app.state.traces.close)
