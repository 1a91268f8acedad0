"""The application: its routes, middleware and lifespan."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.access.browsers import HostCheck, SecurityHeaders, allowed_hosts, with_cors
from server.access.budgets import Budgets
from server.access.gate import Gate
from server.access.keyring import KeyRing
from server.access.refusals import Refusals
from server.api import operations, profiles
from server.api.document import DESCRIPTION, OTHER_ERRORS, TAGS, openapi_document
from server.api.native import generate, steering_routes
from server.api.openai import routes as openai
from server.engines.protocol import Engine
from server.http.error_responses import install_error_handlers
from server.http.middleware import PAGE_FILES, BodyLimit
from server.settings import Settings, refuse_mistyped_access, unknown_variables
from server.state import Service
from steering_vectors.profiles.files import installed_version

logger = logging.getLogger(__name__)


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """An application for these settings. It begins to load the model when it is started; /ready says when it is done.

    A given engine is used instead of one built from the settings, and is the caller's to close. Raises
    ConfigurationError or KeyFileError if what decides about access is not usable.
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
    app.state.service = Service(settings, engine)
    install_error_handlers(app)
    for routes in (openai, generate, steering_routes, profiles, operations):
        app.include_router(routes.router)
    app.add_middleware(BodyLimit)
    _protect(app, settings)
    return app


def _protect(app: FastAPI, settings: Settings) -> None:
    """Add the checks of access, the outermost last."""
    refusals = app.state.refusals = Refusals()
    keys = KeyRing(settings.api_key_file, settings.api_key)
    app.state.budgets = Budgets(settings)
    app.add_middleware(Gate, keys=keys, budgets=app.state.budgets, refusals=refusals)
    hosts = allowed_hosts(settings)
    if hosts is not None:
        app.add_middleware(HostCheck, allowed=hosts, refusals=refusals)
    app.add_middleware(SecurityHeaders)
    if settings.allowed_origins:
        build = app.build_middleware_stack  # around Starlette's own answer to an unexpected error too
        app.build_middleware_stack = lambda: with_cors(build(), settings.allowed_origins)  # type: ignore[method-assign]


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
