"""Methods side by side: the same fits and measurements as alone, at equal KL, and reasons for those that fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.evaluation.compare_methods import STRENGTHS, ComparisonSettings, compare_methods
from steering_vectors.evaluation.preference_suite import EvaluationSettings, evaluate
from steering_vectors.fitting.fit import fit
from steering_vectors.measures.results import MethodComparison
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.reports.comparison import render_comparison
from tests.support.few_texts import few_texts

pytestmark = pytest.mark.slow

METHODS = ("pca", "mean-diff")
Compared = tuple[MethodComparison, list[Profile]]


@pytest.fixture(scope="module", autouse=True)
def _fewer_texts() -> Iterator[None]:
    """As many as it takes to meet the budget."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_texts(monkeypatch, rows=64, short=True)
        yield


@pytest.fixture(scope="module")
def compared(lm: LanguageModel, pairs: Preferences) -> Compared:
    return compare_methods(lm, pairs, ComparisonSettings(METHODS, layers="1", randoms=2))


def test_each_profile_is_the_one_that_fit_gives(lm: LanguageModel, pairs: Preferences, compared: Compared) -> None:
    found, profiles = compared
    assert [one["method"] for one in found["methods"]] == [*METHODS, "random", "random"]
    assert [profile.name for profile in profiles] == list(METHODS)
    for profile in profiles:
        alone = fit(lm, None, pairs, method=profile.method, layers="1", name="helpful")
        assert torch.equal(profile.directions[1], alone.directions[1])
        assert (profile.unit, profile.calibration) == (alone.unit, alone.calibration)


def test_all_cost_the_budget_at_strength_1(compared: Compared) -> None:
    for one in compared[0]["methods"]:
        assert one["kl_at_1"] == pytest.approx(0.1, rel=0.05)
        assert [point["strength"] for point in one["strengths"]] == list(STRENGTHS)
        assert one["layers"] == [1]
        assert one["stored_bytes"] > 4 * 32


def test_margins_are_those_of_an_evaluation(lm: LanguageModel, pairs: Preferences, compared: Compared) -> None:
    found, profiles = compared
    settings = EvaluationSettings(STRENGTHS, randoms=0, reward_samples=0)
    for one, profile in zip(found["methods"], profiles, strict=False):
        alone = evaluate(lm, profile, pairs, settings)
        assert one["strengths"] == alone["strengths"]
        assert one["costs"] == alone["costs"]
        assert (one["strengths"][2]["margin"] - one["strengths"][0]["margin"]) == pytest.approx(
            2 * one["steerability"], rel=1e-6
        )
        assert found["data"] == alone["data"]
        assert found["data"]["notes"] == []


def test_a_method_that_the_data_does_not_suit_is_listed_with_its_reason(lm: LanguageModel, pairs: Preferences) -> None:
    unpaired = replace(pairs, kind="unpaired")
    found, profiles = compare_methods(lm, unpaired, ComparisonSettings(("mean-diff", "bipo"), layers="1", randoms=0))
    assert [profile.method for profile in profiles] == ["mean-diff"]
    assert list(found["failed"]) == ["bipo"]
    assert "pair" in found["failed"]["bipo"]
    with pytest.raises(FitError, match="bipo: "):
        compare_methods(lm, unpaired, ComparisonSettings(("bipo",), layers="1"))


def test_settings_are_checked_before_any_work() -> None:
    with pytest.raises(FitError, match="'none' is not one of"):
        ComparisonSettings(("none",))
    with pytest.raises(FitError, match="pca, which is not compared"):
        ComparisonSettings(("mean-diff",), {"pca": {}})
    assert len(ComparisonSettings().chosen) == 7


def test_the_page_holds_the_figures(compared: Compared) -> None:
    page = render_comparison(compared[0])
    stored = re.search(r'<script type="application/json" id="data">(.*)</script>', page)
    assert stored is not None
    assert json.loads(stored[1]) == json.loads(json.dumps(compared[0]))
    assert page.count("<svg") == 2
    assert all(f"<td>{name}</td>" in page for name in (*METHODS, "random"))
