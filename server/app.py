"""The application: its routes, middleware and lifespan."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.api import operations, profiles
from server.api.document import DESCRIPTION, OTHER_ERRORS, TAGS, openapi_document
from server.api.native import generate, steering_routes
from server.api.openai import routes as openai
from server.engines.protocol import Engine
from server.http.error_responses import install_error_handlers
from server.http.middleware import PAGE_FILES, BearerKeys, BodyLimit
from server.settings import Settings, read_api_keys, unknown_variables
from server.state import Service
from steering_vectors.profiles.files import installed_version

logger = logging.getLogger(__name__)


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """An application for these settings. It begins to load the model when it is started; /ready says when it is done.

    A given engine is used instead of one built from the settings, and is the caller's to close. Raises
    ConfigurationError if the key file is not usable.
    """
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
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_in_flight=settings.max_bytes_in_flight)
    if settings.api_key_file is not None:
        app.add_middleware(BearerKeys, keys=read_api_keys(settings.api_key_file))
    return app


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
