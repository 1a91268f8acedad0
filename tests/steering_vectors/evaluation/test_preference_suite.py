"""The preference suite: plain references, controls and the HTML page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from steering_vectors.data.chat import Example, encode_example
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError, ProfileMismatch
from steering_vectors.evaluation.preference_suite import EvaluationSettings, evaluate, norm_ratios, slopes
from steering_vectors.fitting.fit import fit
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.measures.results import PreferenceEvaluation
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from steering_vectors.reports.evaluation import frontier_sentence, headline, render_report
from steering_vectors.tuning.instructions import DEFAULTS
from tests.support.by_hand import shifted
from tests.support.few_texts import few_texts
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

STRENGTHS = (-1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def profile(lm: LanguageModel, pairs: Preferences) -> Profile:
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_texts(monkeypatch, short=True)
        return fit(lm, None, pairs, layers="1", name="warm", text_tokens=0)


@pytest.fixture(scope="module")
def found(lm: LanguageModel, pairs: Preferences, profile: Profile) -> PreferenceEvaluation:
    return evaluate(lm, profile, pairs, EvaluationSettings(strengths=STRENGTHS, randoms=3))


def log_likelihood(lm: LanguageModel, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logs = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
    return float(logs.gather(1, torch.tensor(ids[start:]).unsqueeze(1)).sum())


def plain_margins(lm: LanguageModel, profile: Profile, rows: Preferences, strength: float) -> list[float]:
    """log P(chosen) − log P(rejected) of each pair, the shift of block 1 added by hand."""
    margins = []
    for pair in rows.pairs():
        sides = []
        for ids, start in (encode_example(lm.tokenizer, one) for one in pair):
            with shifted(lm, {1: strength * profile.unit * profile.directions[1]}, start - 1):
                sides.append(log_likelihood(lm, list(ids), start))
        margins.append(sides[0] - sides[1])
    return margins


def test_margins_equal_a_plain_measurement(
    lm: LanguageModel, pairs: Preferences, profile: Profile, found: PreferenceEvaluation
) -> None:
    _, heldout = pairs.split(0.2, 0, min_side=4)
    assert found["data"]["read"] == heldout.rows == 8
    for point in found["strengths"]:
        margins = plain_margins(lm, profile, heldout, point["strength"])
        assert point["margin"] == pytest.approx(np.mean(margins), abs=1e-3)
        assert point["accuracy"] == np.mean(np.array(margins) > 0)
        low, high = point["margin_95"]
        assert low <= point["margin"] <= high


def test_random_directions_are_measured_alike(
    lm: LanguageModel, pairs: Preferences, profile: Profile, found: PreferenceEvaluation
) -> None:
    _, heldout = pairs.split(0.2, 0, min_side=4)
    for control, kept in zip(random_controls(profile, 3), found["random"], strict=True):
        for point in kept["strengths"]:
            assert point["margin"] == pytest.approx(
                np.mean(plain_margins(lm, control, heldout, point["strength"])), abs=1e-3
            )
    assert len({one["strengths"][-1]["margin"] for one in found["random"]}) == 3


def test_steerability_is_the_mean_slope_over_pairs(
    lm: LanguageModel, pairs: Preferences, profile: Profile, found: PreferenceEvaluation
) -> None:
    _, heldout = pairs.split(0.2, 0, min_side=4)
    margins = [plain_margins(lm, profile, heldout, strength) for strength in STRENGTHS]
    expected = np.polyfit(STRENGTHS, np.array(margins), 1)[0]
    assert found["slopes"] == pytest.approx(expected, abs=1e-3)
    assert found["steerability"] == pytest.approx(expected.mean(), abs=1e-3)
    assert found["anti_steerable"] == np.mean(expected < 0)


def test_costs_and_ratios(profile: Profile, found: PreferenceEvaluation) -> None:
    at = {cost["strength"]: cost["kl"] for cost in found["costs"]}
    assert at[0.0] == 0
    assert at[1.0] == pytest.approx(0.1, rel=0.3)
    ratio = profile.unit * float(profile.directions[1].norm()) / profile.residual_norms[1]
    assert norm_ratios(profile) == found["norm_ratios"] == {"1": pytest.approx(ratio)}


def test_the_prompting_baseline_is_the_model_under_an_instruction(
    lm: LanguageModel, pairs: Preferences, found: PreferenceEvaluation
) -> None:
    _, heldout = pairs.split(0.2, 0, min_side=4)
    margins = []
    for pair in heldout.pairs():
        sides = []
        for one in pair:
            plain, start = encode_example(lm.tokenizer, one)
            led = lm.tokenizer(f"{DEFAULTS['warm'].positive}\n\n{one.prompt}")["input_ids"]
            sides.append(log_likelihood(lm, [*led, *plain[start:]], len(led)))
        margins.append(sides[0] - sides[1])
    assert found["prompting"]["positive"]["margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert found["prompting"]["positive_instruction"] == DEFAULTS["warm"].positive


def test_slopes_are_least_squares() -> None:
    margins = np.random.default_rng(0).normal(size=(3, 5))
    assert slopes((-1.0, 0.0, 2.0), margins) == pytest.approx(np.polyfit([-1.0, 0.0, 2.0], margins, 1)[0])


def test_random_controls_have_the_profile_s_norms(profile: Profile) -> None:
    controls = random_controls(profile, 3)
    norms = [float(control.directions[1].norm()) for control in controls]
    assert norms == pytest.approx([float(profile.directions[1].norm())] * 3)
    assert not torch.equal(controls[0].directions[1], controls[1].directions[1])


def test_the_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_unpaired_rows_have_no_slopes(lm: LanguageModel, profile: Profile) -> None:
    words = [f"{word} {row}" for row in range(20) for word in ("please", "apples")]
    unpaired = Preferences(
        "unpaired",
        tuple(Example(None, text) for text in words[::2]),
        tuple(Example(None, text) for text in words[1::2]),
    )
    one = evaluate(lm, profile, unpaired, EvaluationSettings(strengths=STRENGTHS, randoms=0))
    assert one["unit"] == "nats per token"
    assert "slopes" not in one
    assert "anti_steerable" not in one


def test_rewards_are_fitted_to_the_rows_that_the_profile_was_trained_on(found: PreferenceEvaluation) -> None:
    reward = found["reward"]
    assert (reward["scorer"]["fitted_rows"], reward["scorer"]["tested_texts"]) == (32, 16)
    assert reward["scorer"]["auc"] == 1
    assert [one["strength"] for one in reward["strengths"]] == list(STRENGTHS)
    assert "its AUC is 1.00." in frontier_sentence(reward)


def test_reward_may_be_left_out(lm: LanguageModel, pairs: Preferences, profile: Profile) -> None:
    one = evaluate(lm, profile, pairs, EvaluationSettings(strengths=STRENGTHS, randoms=0, reward_samples=0))
    assert one["reward"] == {"note": "it was not requested"}
    page = render_report([one])
    assert page.count("<svg") == 3
    assert "Reward against KL was not measured: it was not requested." in page


def test_the_seed_reaches_controls_and_intervals(lm: LanguageModel, pairs: Preferences, profile: Profile) -> None:
    first, again, other = (
        evaluate(lm, profile, pairs, EvaluationSettings(strengths=STRENGTHS, randoms=1, reward_samples=4, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first["strengths"][0]["margin"] == other["strengths"][0]["margin"]
    assert first["strengths"][0]["margin_95"] != other["strengths"][0]["margin_95"]
    assert first["random"] != other["random"]


def test_another_model_is_refused(lm: LanguageModel, pairs: Preferences, profile: Profile) -> None:
    other = wrap_model(tiny_model("gpt2"), tiny_tokenizer())
    with pytest.raises(ProfileMismatch):
        evaluate(other, profile, pairs)


def test_strengths_are_checked() -> None:
    with pytest.raises(FitError, match="must hold 0 and at least two others"):
        EvaluationSettings(strengths=(-1.0, 1.0, 2.0))


def test_rows_that_were_left_out_are_on_the_page(found: PreferenceEvaluation) -> None:
    left_out: PreferenceEvaluation = {**found, "data": {**found["data"], "notes": ["2 rows <b> were skipped"]}}
    assert "<p>Note: 2 rows &lt;b&gt; were skipped.</p>" in render_report([left_out])


def test_the_page_stands_alone(found: PreferenceEvaluation) -> None:
    page = render_report([found])
    assert "Note:" not in page
    assert page.count("<svg") == 4
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "<script src" not in page
    assert headline(found) in page.replace("&#x27;", "'")
    assert frontier_sentence(found["reward"]) in page.replace("&#x27;", "'")
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert stored is not None
    assert json.loads(stored[1]) == json.loads(json.dumps([found]))
    assert "is outside their range" in headline(found)
