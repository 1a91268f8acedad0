"""A tiny model, preference data and a profile on disk, and the offline commands to run on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from steering_vectors.cli.app import register
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import save_profile
from tests.support.few_texts import few_texts
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

Run = Callable[..., Result]

app = typer.Typer()
register(app)


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_texts(monkeypatch, short=True)
        yield


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command. Arguments are converted to text."""
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "model"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "pairs.jsonl"
    rows = [{"prompt": f"Ask {row}", "chosen": " please, kindly", "rejected": " three apples"} for row in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def warm(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the profile `warm` of the tiny model."""
    directory = tmp_path_factory.mktemp("cli") / "profiles"
    identity = load_model(str(tiny)).identity
    save_profile(tiny_profile(identity, layers=(1,), unit=0.3, residual_norms={1: 50.0}), directory)
    return directory
