"""The application: routes, statuses and what runs beside them. Nothing is global; everything hangs on one `Service`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.api import operations, profiles
from server.api.document import DESCRIPTION, OTHER_ERRORS, TAGS, openapi_document
from server.api.native import compare, score
from server.api.native import generate as native
from server.api.native import steering_routes as steering
from server.api.openai import routes as openai
from server.engines.protocol import Engine
from server.http.error_responses import ErrorReporter
from server.http.middleware import PAGE_FILES, BearerKeys, BodyLimit
from server.settings import Settings, read_api_keys, unknown_variables
from server.state import Service
from steering_vectors.errors import (
    Conflict,
    Overloaded,
    ProfileError,
    RequestError,
    TrimtabError,
    Unavailable,
    UnknownGeneration,
    UnknownModel,
    UnknownProfile,
    UnknownRoute,
)
from steering_vectors.profiles.files import installed_version

logger = logging.getLogger(__name__)

STATUSES: Mapping[type[TrimtabError], int] = {
    UnknownProfile: 404,
    UnknownModel: 404,
    UnknownGeneration: 404,
    UnknownRoute: 404,
    Conflict: 409,
    Overloaded: 429,
    Unavailable: 503,
    RequestError: 400,
    ProfileError: 400,
    TrimtabError: 500,
}


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """An application for these settings. It begins to load when it is started, and /ready says when it has.

    An engine that is passed is used in the place of one made from the settings, and is the caller's to close.
    Raises ConfigurationError if the key file is not usable.
    """
    app = FastAPIOffline(  # FastAPI's own pages load scripts from elsewhere
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
    app.state.reporter = ErrorReporter(STATUSES)
    app.state.reporter.install(app)
    for routes in (openai, native, score, compare, steering, profiles, operations):
        app.include_router(routes.router)
    app.add_middleware(BodyLimit)
    if settings.api_key_file is not None:
        app.add_middleware(BearerKeys, keys=read_api_keys(settings.api_key_file))
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting of this server", name)
    service: Service = app.state.service
    service.start()
    try:
        yield
    finally:
        await service.close()
