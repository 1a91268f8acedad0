"""Reward against KL: the optimum equals its closed form, and measurements equal plain references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.evaluation.frontier import frontier, optimum, optimum_at, reward_curve
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from steering_vectors.reports.evaluation import frontier_sentence
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

COUNTS, VALUES = np.array([8, 4, 3, 1]), np.array([0.0, 1.0, 2.0, 5.0])
TOY = np.repeat(VALUES, COUNTS)[None, :]  # samples with exactly the shares of a discrete p₀ = counts / 16
PROMPTS = [[5, 6, 7], [8, 9]]


class Letters:
    """A reward that is a rule."""

    name, unit = "share of e", "share"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([text.count("e") / max(len(text), 1) for text in texts])


class Nothing(Letters):
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.full(len(texts), np.nan)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def profile(lm: LanguageModel) -> Profile:
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(0))
    return Profile(name="any", model=lm.identity, directions={1: direction}, method="random", unit=0.3)


def closed_form(base: np.ndarray, sharpness: float) -> tuple[float, float]:
    """E[r] and KL of p* ∝ p₀·exp(r/β), by definition."""
    best = base * np.exp(sharpness * VALUES)
    best /= best.sum()
    return float(best @ VALUES), float((best * np.log(best / base)).sum())


@pytest.mark.parametrize("sharpness", [-2.0, -0.3, 0.1, 1.0, 3.0])
def test_the_optimum_of_a_discrete_distribution_is_its_closed_form(sharpness: float) -> None:
    found = optimum(TOY, sharpness)
    assert (found["reward"], found["kl"]) == pytest.approx(closed_form(COUNTS / 16, sharpness))
    assert found["beta"] == 1 / sharpness
    assert found["kl"] <= math.log(16)


def test_samples_approach_the_closed_form() -> None:
    drawn = np.random.default_rng(0).choice(VALUES, size=(40, 4000), p=COUNTS / 16)
    found = optimum(drawn, 0.5)
    assert (found["reward"], found["kl"]) == pytest.approx(closed_form(COUNTS / 16, 0.5), rel=0.02)


@pytest.mark.slow
def test_no_policy_has_more_reward_at_the_same_divergence() -> None:
    base, draw = COUNTS / 16, np.random.default_rng(0)
    for _ in range(200):
        other = draw.dirichlet(np.ones(4))
        kl = float((other * np.log(other / base)).sum())
        best = optimum_at(np.repeat(VALUES, COUNTS * 100)[None, :], kl, 1)
        assert best is None or best["reward"] >= other @ VALUES - 1e-3


def test_the_frontier_rises_and_is_found_again_by_its_divergence() -> None:
    rewards = np.random.default_rng(0).normal(size=(5, 200))
    points = frontier(rewards)
    assert all(one["reward"] < other["reward"] for one, other in pairwise(points))
    for point in points:
        found = optimum_at(rewards, point["kl"], 1 if point["beta"] > 0 else -1)
        if point["effective"] >= 8:
            assert found is not None
            assert found == pytest.approx(point, rel=1e-2)
        else:
            assert found is None


def test_an_optimum_beyond_the_samples_is_none() -> None:
    assert optimum_at(np.random.default_rng(0).normal(size=(5, 64)), 4.2, 1) is None
    assert frontier(np.ones((3, 8))) == []
    assert optimum_at(np.ones((3, 8)), 0.1, 1) is None
    assert optimum(np.ones((3, 8)), 0.0) == pytest.approx(
        {"beta": math.inf, "reward": 1.0, "kl": 0.0, "effective": 8.0}
    )


def test_a_model_is_measured_as_by_hand(lm: LanguageModel, profile: Profile) -> None:
    with steerable(lm) as steered:
        found = reward_curve(steered, profile, Letters(), PROMPTS, (-1.0, 0.0, 1.0), samples=16, tokens=6, seed=3)
        steered.write(profile, 1.0)
        rows = [prompt for prompt in PROMPTS for _ in range(8)]
        texts = steered.sample(rows, tokens=6, seed=4)
        examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(rows, texts, strict=True)]
        kl = float(steered.divergences(examples)[0].sum()) / 16
        gains = steered.log_likelihoods(examples, steer=True)[0] - steered.log_likelihoods(examples, steer=False)[0]
    low, base, high = found["strengths"]
    assert (base["kl"], base["share"], found["kl_limit"]) == (0.0, None, math.log(16))
    assert high["kl"] == kl > 0
    assert float(gains.mean()) == pytest.approx(kl, abs=4 * float(gains.std()) / 4)
    assert high["reward"] == pytest.approx(Letters()(lm.tokenizer.batch_decode(texts)).mean())
    for one in (low, high):
        assert one["reward_95"][0] <= one["reward"] <= one["reward_95"][1]
        if one["share"] is not None:
            gain = one["reward"] - base["reward"]
            assert one["share"] == pytest.approx(gain / (one["optimum"] - base["reward"]))


def test_equal_seeds_give_equal_figures(lm: LanguageModel, profile: Profile) -> None:
    with steerable(lm) as steered:
        first, again, other = (
            reward_curve(steered, profile, Letters(), PROMPTS, (0.0, 1.0), samples=4, tokens=5, seed=seed)
            for seed in (1, 1, 2)
        )
    assert first == again != other


def test_what_is_refused(lm: LanguageModel, profile: Profile) -> None:
    with steerable(lm) as steered:
        with pytest.raises(FitError, match="a score that is not finite"):
            reward_curve(steered, profile, Nothing(), PROMPTS, (0.0, 1.0), samples=4, tokens=5)
        with pytest.raises(FitError, match="at least two samples each"):
            reward_curve(steered, profile, Letters(), PROMPTS, (0.0, 1.0), samples=1, tokens=5)


def test_the_sentence_says_what_is_known() -> None:
    scorer = {"name": "rule", "unit": "points", "tested_texts": 16, "auc": 0.9}
    zero = {"strength": 0.0, "reward": 1.0, "kl": 0.0, "optimum": None, "share": None}
    half = {"strength": 0.5, "reward": 2.0, "kl": 0.4, "optimum": 3.0, "share": 0.5}
    one = {"strength": 1.0, "reward": 2.5, "kl": 3.0, "optimum": None, "share": None}
    reward = {"scorer": scorer, "strengths": [zero, half, one], "samples_per_prompt": 64}
    assert frontier_sentence(reward) == (
        "At strength +1 the reward (rule) moves by +1.5 for 3 nats of KL per text; at +0.5 it moves by +1 for 0.4 nats "
        "of KL per text, where the KL-regularised optimum moves it by +2 (50% of that). The reward is in points; on 16 "
        "held-out responses its AUC is 0.90."
    )
    poor = {**reward, "scorer": {**scorer, "auc": 0.5}, "strengths": [zero, one]}
    assert "64 samples per prompt do not show the optimum's gain there." in frontier_sentence(poor)
    assert "hardly better than chance" in frontier_sentence(poor)
    assert frontier_sentence({"note": "there are too few rows"}) == (
        "Reward against KL was not measured: there are too few rows."
    )
