"""The official `openai` package for Node: one script sees everything, the tests look at what it saw."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import httpx
import pytest

from tests.clients.page import ROOT, example
from tests.support.serving import until

NODE = ROOT / "tests" / "clients" / "node"
MISSING = shutil.which("node") is None or not (NODE / "node_modules" / "openai").is_dir()

pytestmark = pytest.mark.skipif(MISSING, reason="no node, or its packages are not installed: make test-clients does it")


def node(*words: str) -> str:
    return subprocess.run(["node", *words], cwd=NODE, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def seen(url: str) -> dict[str, Any]:
    return dict(json.loads(node("client.mjs", url)))


def test_the_page(url: str) -> None:
    assert node("--input-type=module", "--eval", example("javascript", "new OpenAI", url)).strip()


def test_a_stream_is_the_whole(seen: dict[str, Any]) -> None:
    whole, streamed = seen["whole"], seen["streamed"]
    assert whole["text"] == streamed["text"] == seen["runner"]
    assert whole["usage"]["completion_tokens"] == streamed["usage"]["completion_tokens"] == 12
    assert streamed["finish"] == "length"
    assert [(one["name"], one["strength"]) for one in whole["steering"]] == [("warm", 0.8)]
    assert streamed["steering"] == whole["steering"]


def test_an_abort_ends_the_generation(seen: dict[str, Any], url: str) -> None:
    aborted = seen["aborted"]
    assert aborted["chunks"] < 100
    path = f"{url}/generations/{aborted['id']}"
    until(lambda: httpx.patch(path, json={"steering": {"profiles": []}}).status_code != 200)


def test_errors(seen: dict[str, Any]) -> None:
    assert seen["unknown"] == {"kind": "NotFoundError", "status": 404, "param": "model"}
    assert seen["bad"] == {"kind": "BadRequestError", "status": 400, "param": "temprature"}


def test_models(seen: dict[str, Any]) -> None:
    assert seen["models"] == ["demo", "demo:concise", "demo:warm"]
