"""One server for all clients: a process of its own, on a free port, with two profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest

from steering_vectors.models.loading import load_model
from tests.clients.process import serving
from tests.support.serving import save_profiles


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiles")
    fields = {"unit": 20.0, "calibration": {"kl_at_1": 0.1}}
    save_profiles(directory, load_model("demo").identity, "warm", "concise", **fields)
    return directory


@pytest.fixture(scope="session")
def url(profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(profiles, tmp_path_factory.mktemp("server") / "log") as url:
        yield url
