"""The Docker image and its compose file: the server listens on all interfaces there, so it needs a key or a flag."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ConfigurationError, load_settings, unknown_variables

DOCKER = Path(__file__).resolve().parents[3] / "docker"
SERVICE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["trimtab"]


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the image."""
    variables = dict(re.findall(r"(TRIMTAB_\w+)=(\S+)", (DOCKER / "Dockerfile").read_text().split("ENV PATH")[1]))
    assert variables["TRIMTAB_HOST"] == "0.0.0.0"
    assert unknown_variables(variables) == []
    for name, value in variables.items():
        if not name.endswith("=true"):
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRIMTAB_ALLOW_UNAUTHENTICATED", raising=False)
    return monkeypatch


def test_it_does_not_start_open(image: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="lets other machines reach a server without keys"):
        load_settings()


def test_it_starts_with_a_key_or_where_it_is_told_that_everyone_may_use_it(image: pytest.MonkeyPatch) -> None:
    with image.context() as patch:
        patch.setenv("TRIMTAB_API_KEY", "secret")
        assert load_settings().api_key == "secret"
    image.setenv("TRIMTAB_ALLOW_UNAUTHENTICATED", "true")
    assert not load_settings().requires_keys


def test_compose_passes_a_key_on_only_if_it_is_set(image: pytest.MonkeyPatch) -> None:
    environment = SERVICE["environment"]
    assert environment["TRIMTAB_API_KEY"] is None  # compose sets no variable then, instead of an empty one
    assert environment["TRIMTAB_ALLOW_UNAUTHENTICATED"] == "${TRIMTAB_ALLOW_UNAUTHENTICATED:-false}"
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    image.setenv("TRIMTAB_ALLOW_UNAUTHENTICATED", "false")
    with pytest.raises(ConfigurationError, match="lets other machines reach a server without keys"):
        load_settings()
