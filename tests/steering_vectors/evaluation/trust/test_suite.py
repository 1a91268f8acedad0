"""The trust suite: its result, controls, settings and HTML page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.errors import DataError, FitError, ProfileMismatch
from steering_vectors.evaluation.trust.suite import VERTICALS, TrustSettings, evaluate_trust, prepare_verticals
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from steering_vectors.reports.evaluation import render_report
from steering_vectors.reports.trust import trust_headline
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import NOWHERE, tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.trust_files import write_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())


@pytest.fixture(scope="module")
def profile(lm: LanguageModel) -> Profile:
    return tiny_profile(lm.identity, unit=0.3)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrustSettings:
    folder = write_all(tmp_path_factory.mktemp("trust"))
    return TrustSettings(folder=folder, strengths=(-1.0, 0.0, 1.0), rows=16, randoms=2)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int, str]]:
    return []


@pytest.fixture(scope="module")
def found(lm: LanguageModel, profile: Profile, settings: TrustSettings, told: list[Any]) -> dict[str, Any]:
    def progress(stage: str, done: int, total: int, /, detail: str = "") -> None:
        told.append((stage, done, total, detail))

    return evaluate_trust(lm, profile, settings, progress=progress)


def test_every_vertical_has_every_strength_and_its_change(found: dict[str, Any]) -> None:
    assert tuple(found["trust"]) == VERTICALS
    assert json.loads(json.dumps(found, allow_nan=False))["trust"].keys() == found["trust"].keys()
    for vertical in found["trust"].values():
        below, base, above = vertical["strengths"]
        assert (below["strength"], base["strength"], above["strength"]) == (-1, 0, 1)
        assert (base["delta"], base["delta_95"], base["change"]) == (0, (0, 0), "no change")
        for point in vertical["strengths"]:
            assert point["delta"] == pytest.approx(point["value"] - base["value"])
            assert point["delta_95"][0] <= point["delta"] <= point["delta_95"][1]
            assert len(point["by_row"]) == vertical["rows"] == 16
        assert vertical["left_out"] == 0
        assert vertical["note"]


def test_random_directions_are_measured_alike(
    lm: LanguageModel, profile: Profile, settings: TrustSettings, found: dict[str, Any]
) -> None:
    vertical = prepare_verticals(lm, replace(settings, verticals=("truthfulness",)))[0]
    stored = found["trust"]["truthfulness"]
    changes = []
    with steerable(lm) as steered:
        for control, kept in zip(random_controls(profile, 2), stored["random"], strict=True):
            for point in kept["strengths"]:
                steered.write(control, point["strength"])
                seen = vertical.read(steered)
                assert point["value"] == seen["true"].mean()
                assert point["figures"]["margin"]["value"] == pytest.approx(seen["margin"].mean())
                changes += [point["figures"]["margin"]["delta"]] if point["strength"] else []
    own = stored["strengths"][-1]["figures"]["margin"]
    assert own["random_delta"] == pytest.approx([min(changes), max(changes)])
    assert own["beyond_random"] is not (min(changes) <= own["delta"] <= max(changes))


def test_equal_seeds_give_equal_figures(
    lm: LanguageModel, profile: Profile, settings: TrustSettings, found: dict[str, Any]
) -> None:
    again = evaluate_trust(lm, profile, settings, verticals=prepare_verticals(lm, settings))
    assert again == found


def test_progress_is_reported(found: dict[str, Any], told: list[tuple[str, int, int, str]]) -> None:
    assert [done for _, done, _, _ in told] == list(range(1, 16))
    assert {(stage, total) for stage, _, total, _ in told} == {("trust", 15)}
    assert tuple(dict.fromkeys(detail for *_, detail in told)) == VERTICALS


def test_a_rate_that_never_moves_is_remarked(found: dict[str, Any]) -> None:
    assert {point["value"] for point in found["trust"]["privacy"]["strengths"]} == {0.0}
    assert (
        "is 0 at every strength. With 16 rows, a true share within 18.8% of it cannot"
        in found["trust"]["privacy"]["remarks"][0]
    )


def test_without_controls_the_note_names_none(lm: LanguageModel, profile: Profile) -> None:
    settings = TrustSettings(verticals=("privacy",), strengths=(0.0, 1.0), rows=8, randoms=0)
    found = evaluate_trust(lm, profile, settings)
    assert found["trust"]["privacy"]["strengths"][1]["beyond_random"] is None
    assert "No random directions were measured" in render_report([found])


def test_a_foreign_profile_is_refused(lm: LanguageModel, settings: TrustSettings) -> None:
    with pytest.raises(ProfileMismatch):
        evaluate_trust(lm, tiny_profile(NOWHERE), settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strengths": (1.0, 2.0)}, "strengths must hold 0"),
        ({"strengths": (0.0,)}, "strengths must hold 0"),
        ({"rows": 7}, "at least 8 rows, not 7"),
        ({"verticals": ("bias", "virtue")}, "'virtue' is not one of toxicity, bias, ethics, truthfulness, privacy"),
        ({"verticals": ("bias", "bias")}, "name each vertical once"),
        ({"verticals": ("bias",), "folder": None}, r"the vertical bias needs a folder with crows-pairs/\*\.csv"),
    ],
)
def test_bad_settings(settings: TrustSettings, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        replace(settings, **fields)


def test_a_missing_file_fails_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file rtp/\*\.jsonl for the vertical toxicity"):
        TrustSettings(folder=tmp_path)


def test_the_page_has_a_plot_and_words_for_each_vertical(found: dict[str, Any]) -> None:
    page = render_report([found])
    assert page.count("<svg") == 5
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert trust_headline(found).startswith("At strength +1: ")
    assert trust_headline(found) in page
    for name, vertical in found["trust"].items():
        assert f"<td>{name}</td>" in page
        for figure in vertical["figures"].values():
            assert figure["measure"] in page
    assert "2 random directions of the same norm" in page
