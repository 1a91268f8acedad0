"""What the README tells people to type is typed here, against a live server with the demo model."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from steering_vectors.storage import save_profile
from tests.serving import demo_engine, live_server, random_profile

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block(language: str, word: str) -> str:
    """The one block of that language in which a word occurs."""
    found = [text for kind, text in BLOCKS if kind == language and word in text]
    assert len(found) == 1, word
    return found[0]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    profiles = tmp_path_factory.mktemp("profiles")
    with demo_engine(slots=4) as engine:
        for seed, name in enumerate(("warm", "concise")):
            save_profile(random_profile(engine.language_model.identity, name, seed=seed), profiles)
        with live_server(engine, profiles) as client:
            yield client


def here(text: str, client: httpx.Client) -> str:
    """A block with the live server's port."""
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("strength", [-1, 0, 1])
def test_the_curl_command(client: httpx.Client, strength: int) -> None:
    command = here(block("bash", "curl"), client).replace('"strength": 1', f'"strength": {strength}')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert answer["steering"][0]["strength"] == strength


def test_the_openai_client(client: httpx.Client) -> None:
    code = here(block("python", "OpenAI("), client)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, receipt = done.stdout.strip().splitlines()
    assert text
    assert [(entry["name"], entry["strength"]) for entry in ast.literal_eval(receipt)] == [
        ("warm", 0.8),
        ("concise", -0.3),
    ]


def test_fit_and_show(tmp_path: Path) -> None:
    for command in block("bash", "trimtab fit").strip().splitlines():
        words = command.split()
        assert words[0] == ".venv/bin/trimtab"
        words = [str(tmp_path) if word == "profiles" else word for word in words[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "polite" in done.stdout
    assert (tmp_path / "polite.safetensors").is_file()


def test_the_python_interface() -> None:
    code = block("python", "steer(lm.model")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20


def test_the_two_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", block("bash", "make serve"), re.MULTILINE)) <= set(targets)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
