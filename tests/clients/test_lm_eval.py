"""lm-evaluation-harness: its `local-completions` on the server says what its `hf` says of the same weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.page import ROOT, example

MODEL = "steering_vectors/demo/model"
FROM_DISK = ["--model", "hf", "--model_args", f"pretrained={MODEL},dtype=float32", "--device", "cpu"]
TASKS = ["--include_path", "tests/clients/tasks", "--tasks", "warm_or_cold,replies"]
TOLERANCE = 1e-3

Samples = dict[int, dict[str, Any]]


def run(command: list[str], out: Path) -> Path:
    """Where the harness has put its samples."""
    harness = [sys.executable, "-m", "lm_eval", *command[1:], "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(harness, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def samples(out: Path, task: str) -> Samples:
    (path,) = out.rglob(f"samples_{task}_*.jsonl")
    return {one["doc_id"]: one for one in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def loglikelihoods(out: Path) -> list[float]:
    """Of the warm and the cold reply to each question, in order."""
    found = samples(out, "warm_or_cold")
    return [float(answer[0]) for index in sorted(found) for answer in found[index]["filtered_resps"]]


def replies(out: Path) -> list[str]:
    found = samples(out, "replies")
    return [found[index]["resps"][0][0] for index in sorted(found)]


def over_http(url: str, model: str = "demo") -> list[str]:
    arguments = f"model={model},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={MODEL}"
    return ["lm_eval", "run", "--model", "local-completions", "--model_args", arguments, *TASKS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(["lm_eval", "run", *FROM_DISK, *TASKS], tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def served(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(over_http(url), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def steered(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the line of the page."""
    line = shlex.split(example("bash", "lm_eval run", url).replace("\\\n", " "))
    return run(line, tmp_path_factory.mktemp("steered"))


def test_loglikelihoods_are_those_of_the_weights(reference: Path, served: Path) -> None:
    expected, found = loglikelihoods(reference), loglikelihoods(served)
    assert len(found) == 24
    assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_greedy_replies_are_those_of_the_weights(reference: Path, served: Path) -> None:
    assert replies(served) == replies(reference)
    assert all(reply.strip() for reply in replies(served))


def test_a_strength_changes_them(served: Path, steered: Path) -> None:
    pairs = zip(loglikelihoods(served), loglikelihoods(steered), strict=True)
    assert all(abs(plain - moved) > TOLERANCE for plain, moved in pairs)
