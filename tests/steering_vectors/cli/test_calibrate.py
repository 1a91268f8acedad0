"""`trimtab calibrate` replaces the profile or stores it elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from steering_vectors.profiles.files import load_profile
from tests.steering_vectors.cli.conftest import Run

pytestmark = pytest.mark.slow


def test_the_profile_is_replaced(run: Run, tiny: Path, pairs: Path, warm: Path, tmp_path: Path) -> None:
    shutil.copy(warm / "warm.safetensors", tmp_path)
    options = ("--profiles", tmp_path, "--model", tiny, "--data", pairs, "--kl-budget", "0.05")
    result = run("calibrate", "warm", *options, "--json")
    assert result.exit_code == 0, result.output
    stored, printed = load_profile(tmp_path / "warm.safetensors"), json.loads(result.stdout)
    assert printed["calibration"]["kl_budget"] == stored.calibration["kl_budget"] == 0.05
    assert (printed["max_strength"], printed["version"]) == (stored.max_strength, stored.version)
    assert load_profile(warm / "warm.safetensors").calibration == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--perplexity-bound", "1"), "the perplexity bound must be a factor above 1, not 1"),
        (("--kl-budget", "nan"), "the KL budget must be a positive number of nats per token, not nan"),
    ],
)
def test_unusable_settings(
    run: Run, tiny: Path, pairs: Path, warm: Path, options: tuple[str, str], message: str
) -> None:
    result = run("calibrate", "warm", "--profiles", warm, "--model", tiny, "--data", pairs, *options)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
