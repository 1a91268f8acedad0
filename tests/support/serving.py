"""Fixtures of the server tests: random profiles, an engine on the demo model, a live server on a free port.

A module defines its own with `engine = engine_fixture(…)`, `profiles = profiles_fixture(…)` and
`client = client_fixture(…)`.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.app import create_app
from server.engines.config import EngineConfig
from server.engines.protocol import Engine
from server.http.connections import ConnectionLimits
from server.http.listener import GRACE_SECONDS, Server, listening, run_in_loop, tls_options, url_of
from server.settings import Settings
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile
from tests.support.running import PATIENCE, HeldEngine


def random_profile(identity: ModelIdentity, name: str, *, seed: int = 0, **fields: Any) -> Profile:
    """A profile with a random direction at every other block."""
    generator = torch.Generator().manual_seed(seed)
    layers = range(1, identity.num_layers, 2)
    directions = {layer: torch.randn(identity.hidden_size, generator=generator) for layer in layers}
    return Profile(**{"name": name, "model": identity, "directions": directions, "method": "random", **fields})


def save_profiles(directory: Path, identity: ModelIdentity, *names: str, **fields: Any) -> None:
    for seed, name in enumerate(names):
        save_profile(random_profile(identity, name, seed=seed, **fields), directory)


@contextmanager
def demo_engine(**options: Any) -> Iterator[HeldEngine]:
    """An engine on its own copy of the demo model in float32."""
    engine = HeldEngine(load_model("demo", dtype="float32"), EngineConfig(**options))
    try:
        yield engine
    finally:
        asyncio.run(engine.close())


@contextmanager
def live_server(
    engine: Engine,
    profiles: Path,
    *,
    grace: float = GRACE_SECONDS,
    limits: ConnectionLimits | None = None,
    tracer_provider: Any = None,
    verify: ssl.SSLContext | bool = True,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A client of a ready server that runs in a thread and is stopped at the end. `verify` is the client's view of the
    server's certificate."""
    given = Settings(profiles=profiles, **{} if "uds" in settings else {"port": 0}, **settings)
    app = create_app(given, engine, tracer_provider=tracer_provider)
    tls = tls_options(given)
    server = Server(app, end=engine.close, drain=app.state.service.drain, grace=grace, limits=limits, tls=tls)
    with listening(given) as listener:
        url = url_of("127.0.0.1", listener, tls=bool(tls))
        local = httpx.HTTPTransport(uds=str(given.uds)) if given.uds else None
        thread = threading.Thread(target=lambda: run_in_loop(server.serve(sockets=[listener])), name="live-server")
        thread.start()
        try:
            base = "http://localhost" if local else url
            with httpx.Client(base_url=base, transport=local, verify=verify, timeout=PATIENCE) as client:
                until(lambda: client.get("/ready").status_code == 200)
                yield client
        finally:
            server.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def engine_fixture(**options: Any) -> Any:
    """A module's `engine`, created by `demo_engine`."""

    @pytest.fixture(scope="module", name="engine")
    def made() -> Iterator[HeldEngine]:
        with demo_engine(**options) as engine:
            yield engine

    return made


def profiles_fixture(*names: str, **fields: Any) -> Any:
    """A module's `profiles`: a directory with a random profile for each name, made for its `engine`."""

    @pytest.fixture(scope="module", name="profiles")
    def made(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("profiles")
        save_profiles(directory, engine.info.identity, *names, **fields)
        return directory

    return made


def client_fixture(**settings: Any) -> Any:
    """A module's `client` of a live server on its `engine` and `profiles`."""

    @pytest.fixture(scope="module", name="client")
    def made(engine: Engine, profiles: Path) -> Iterator[httpx.Client]:
        with live_server(engine, profiles, **settings) as client:
            yield client

    return made


def until(condition: Callable[[], bool], *, within: float = PATIENCE) -> float:
    """Wait for a condition that another thread fulfils. Returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within, f"it did not happen within {within} s"
        time.sleep(0.01)
    return time.monotonic() - start
