"""Shared set-up: offline, one thread, the demo model loaded once."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from steering_vectors.models import LanguageModel, load_model

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> LanguageModel:
    """The embedded demo model in float32."""
    return load_model("demo", dtype="float32")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and data beside the checkout; tests that use it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real models and data beside the checkout")
    return SHARED
