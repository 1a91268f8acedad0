"""The Docker image listens inside its container; its compose file publishes it, with a key or a flag."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ConfigurationError, is_loopback, load_settings, unknown_variables

DOCKER = Path(__file__).resolve().parents[3] / "docker"
SERVICE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["trimtab"]


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the image."""
    variables = dict(re.findall(r"(TRIMTAB_\w+)=(\S+)", (DOCKER / "Dockerfile").read_text().split("ENV PATH")[1]))
    assert "TRIMTAB_HOST" not in variables
    assert unknown_variables(variables) == []
    for name, value in variables.items():
        if not name.endswith("=true"):
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRIMTAB_ALLOW_UNAUTHENTICATED", raising=False)
    return monkeypatch


def test_it_is_not_reachable_from_outside_by_itself(image: pytest.MonkeyPatch) -> None:
    assert is_loopback(load_settings().host)


@pytest.fixture
def published(image: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The same, as the compose file changes it."""
    assert SERVICE["environment"]["TRIMTAB_HOST"] == "0.0.0.0"
    image.setenv("TRIMTAB_HOST", "0.0.0.0")
    return image


def test_it_does_not_start_open(published: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="lets other machines reach a server without keys"):
        load_settings()


def test_it_starts_with_a_key_or_where_it_is_told_that_everyone_may_use_it(published: pytest.MonkeyPatch) -> None:
    with published.context() as patch:
        patch.setenv("TRIMTAB_API_KEY", "secret")
        assert load_settings().api_key == "secret"
    published.setenv("TRIMTAB_ALLOW_UNAUTHENTICATED", "true")
    assert not load_settings().requires_keys


def test_compose_passes_a_key_on_only_if_it_is_set(published: pytest.MonkeyPatch) -> None:
    environment = SERVICE["environment"]
    assert environment["TRIMTAB_API_KEY"] is None  # compose sets no variable then, instead of an empty one
    assert environment["TRIMTAB_ALLOW_UNAUTHENTICATED"] == "${TRIMTAB_ALLOW_UNAUTHENTICATED:-false}"
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    published.setenv("TRIMTAB_ALLOW_UNAUTHENTICATED", "false")
    with pytest.raises(ConfigurationError, match="lets other machines reach a server without keys"):
        load_settings()
