"""Simon Willison's `llm` on its command line, with models of an extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.page import example

QUESTION = "How do I bake bread?"


@pytest.fixture(scope="module")
def home(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    (directory / "extra-openai-models.yaml").write_text(example("yaml", "extra-openai-models", url), encoding="utf-8")
    return directory


def run(home: Path, command: list[str]) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "LLM_USER_PATH": str(home), "PATH": path}
    done = subprocess.run(command, env=environment, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ask(home: Path, model: str, *more: str) -> str:
    return run(home, ["llm", "-m", model, "-o", "temperature", "0", "-o", "max_tokens", "12", *more, QUESTION])


def test_the_page(url: str, home: Path) -> None:
    assert run(home, ["bash", "-c", example("bash", "llm -m", url)])


def test_a_stream_is_the_whole(home: Path) -> None:
    assert ask(home, "demo") == ask(home, "demo", "--no-stream") != ""


def test_strengths_differ(home: Path) -> None:
    assert len({ask(home, model) for model in ("cold", "demo", "warm")}) == 3


def test_what_it_logs(home: Path) -> None:
    text = ask(home, "warm")
    (logged,) = json.loads(run(home, ["llm", "logs", "-n", "1", "--json"]))
    assert (logged["model"], logged["response"].strip()) == ("warm", text)
    assert logged["output_tokens"] == 12


def test_a_conversation(home: Path) -> None:
    ask(home, "demo")
    assert run(home, ["llm", "-c", "-o", "max_tokens", "12", "And tea?"])
