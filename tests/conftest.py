"""Shared set-up: offline, one thread, the demo model loaded once."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process's servers too: tests run one on each processor

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs and some CI runners begin
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a Ctrl-C is what some tests send

if gc.isenabled():  # until all is loaded: collections would look at a million objects again and again
    gc.disable()

import pytest
import torch
from hypothesis import Phase, settings

from steering_vectors.models.loading import LanguageModel, load_model

SHARED = Path(__file__).resolve().parents[2] / "shared"


# The same examples at every run, however busy the processors are. HYPOTHESIS_PROFILE=random draws others each time.
settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.register_profile("random", derandomize=False, deadline=None, database=None)
settings.register_profile(  # for mutation tests, which ask only whether a test fails
    "unshrunk", derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "seeded"))


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of garbage collections, as the server does when it starts."""
    gc.collect()
    gc.freeze()
    gc.enable()


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
