"""The unit meets its KL budget on new texts, measured by code that calibration does not use."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch

from steering_vectors.data.chat import Example
from steering_vectors.data.corpus import encode_corpus
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError, ProfileMismatch
from steering_vectors.fitting.calibration import (
    CalibrationSettings,
    calibrate,
    calibrate_on,
    cost_of,
    largest_coefficient,
    search,
    trained_and_fresh,
)
from steering_vectors.fitting.fit import fit
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

PROMPTS = [[0, *range(first, first + 3 + first % 4)] for first in range(20, 52)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def profile_for(lm: LanguageModel, **fields: object) -> Profile:
    draw = torch.Generator().manual_seed(1)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (1, 2)}
    norms = dict.fromkeys(directions, 50.0)
    return replace(Profile("test", lm.identity, directions, "mean-diff", residual_norms=norms), **fields)  # type: ignore[arg-type]


def measured_kl(lm: LanguageModel, profile: Profile, prompts: list[list[int]], tokens: int, seed: int) -> float:
    """Mean KL per token over new samples, one text at a time, with the shift added by plain hooks."""
    shifts = {layer: profile.unit * direction for layer, direction in profile.injected().items()}

    def logs(ids: torch.Tensor) -> torch.Tensor:
        return lm.model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)  # type: ignore[no-any-return]

    draw = torch.Generator().manual_seed(seed)
    total = count = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt] * 8)
            alive = torch.ones(len(ids), dtype=torch.bool)
            for _ in range(tokens):
                base = logs(ids)
                with shifted(lm, shifts, len(prompt) - 1):
                    steered = logs(ids)
                total += float((steered.exp() * (steered - base)).sum(-1)[alive].sum())
                count += int(alive.sum())
                drawn = torch.multinomial(steered.exp(), 1, generator=draw)
                alive &= drawn[:, 0] != lm.tokenizer.eos_token_id
                ids = torch.cat([ids, drawn], dim=1)
    return total / count


@pytest.mark.parametrize("layering", ["independent", "incremental"])
def test_fresh_samples_cost_the_budget(lm: LanguageModel, layering: str) -> None:
    profile = calibrate_on(lm, profile_for(lm, layering=layering), PROMPTS, kl_budget=0.1, tokens=16, seed=0)
    assert profile.calibration["kl_at_1"] == pytest.approx(0.1, rel=0.03)
    assert profile.calibration["unreached"] is False
    assert measured_kl(lm, profile, PROMPTS[::2], 16, seed=99) == pytest.approx(0.1, rel=0.1)


def test_what_is_recorded(lm: LanguageModel) -> None:
    calibration = calibrate_on(lm, profile_for(lm), PROMPTS, tokens=8, seed=7).calibration
    assert set(calibration) == {
        "kl_budget", "kl_at_1", "kl_per_character", "unreached", "prompts", "prompts_sha256", "texts", "tokens", "seed",
        "perplexity_bound", "curve",
    }  # fmt: skip
    assert (calibration["prompts"], calibration["texts"], calibration["seed"]) == (32, 384, 7)
    assert 384 <= calibration["tokens"] <= 384 * 8
    assert calibration["prompts_sha256"] == hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert calibration["kl_per_character"] > 0


def test_the_cost_per_character(lm: LanguageModel) -> None:
    """The same nats, over the characters of what was written."""
    profile = profile_for(lm, unit=0.3)
    texts = [([0, 9, *lm.tokenizer.encode(text, add_special_tokens=False)], 2) for text in ("warm water", "a pear")]
    with steerable(lm) as steered:
        cost, silent = cost_of(steered, profile, texts), cost_of(steered, profile, [([0, 9, 1], 2)])
    total = 0.0
    shifts = {layer: profile.unit * direction for layer, direction in profile.injected().items()}
    for ids, start in texts:
        logs = []
        for wanted in ({}, shifts):
            with torch.no_grad(), shifted(lm, wanted, start - 1):
                logs.append(lm.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1))
        total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
    assert cost.tokens == sum(len(ids) - start for ids, start in texts) < len("warm watera pear")
    assert cost.per_token == pytest.approx(total / cost.tokens, rel=1e-4)
    assert cost.per_character == pytest.approx(total / len("warm watera pear"), rel=1e-4)
    assert silent.per_character is None


def test_the_last_search_reads_texts_written_at_its_unit(lm: LanguageModel) -> None:
    """At this budget the searches move the unit by 24 %, 6 % and not at all, so the cost is that of its own texts.

    One search alone would end at a unit 6 % smaller, with a cost that differs by 0.7 % from its own texts'.
    """
    profile = calibrate_on(lm, profile_for(lm), PROMPTS, kl_budget=1.0, tokens=16, seed=1)
    with steerable(lm) as steered:
        steered.write(profile, 1.0)
        texts = steered.continuations(PROMPTS * 12, tokens=16, seed=1)
        found = cost_of(steered, profile, texts)
    assert profile.calibration["kl_at_1"] == pytest.approx(found.per_token, rel=1e-3)
    assert profile.calibration["kl_per_character"] == pytest.approx(found.per_character, rel=1e-3)
    assert profile.calibration["tokens"] == found.tokens


def test_it_is_deterministic_and_the_seed_matters(lm: LanguageModel) -> None:
    first, again, other = (calibrate_on(lm, profile_for(lm), PROMPTS, tokens=8, seed=seed) for seed in (0, 0, 1))
    assert (first.unit, first.calibration) == (again.unit, again.calibration)
    assert first.unit != other.unit


def test_an_unreachable_budget_stops_at_norm_ratio_one(lm: LanguageModel) -> None:
    profile = profile_for(lm, residual_norms={1: 0.02, 2: 3.0})
    found = calibrate_on(lm, profile, PROMPTS[:4], kl_budget=5.0, tokens=8)
    assert found.calibration["unreached"] is True
    assert found.calibration["kl_at_1"] < 5.0
    assert found.unit * float(profile.directions[1].norm()) == pytest.approx(0.02)
    assert found.unit == pytest.approx(largest_coefficient(profile))


def test_a_bfloat16_model_calibrates_too() -> None:
    lm = wrap_model(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer())
    found = calibrate_on(lm, profile_for(lm), PROMPTS[:8], kl_budget=0.2, tokens=8)
    assert found.calibration["kl_at_1"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_positive(lm: LanguageModel, budget: float) -> None:
    with pytest.raises(FitError, match="the KL budget must be a positive number of nats per token, not"):
        calibrate_on(lm, profile_for(lm), PROMPTS, kl_budget=budget)


def test_calibration_needs_prompts_and_residual_norms(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="there is no prompt to calibrate on"):
        calibrate_on(lm, profile_for(lm), [])
    with pytest.raises(FitError, match="cannot be calibrated without its residual norms"):
        calibrate_on(lm, profile_for(lm, residual_norms={}), PROMPTS)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("root", [0.01, 0.3, 9.9])
def test_the_search_finds_the_root_of_any_power(power: float, root: float) -> None:
    calls: list[float] = []

    def kl_at(coefficient: float) -> float:
        calls.append(coefficient)
        return 0.1 * (coefficient / root) ** power

    found = search(kl_at, 10.0, 0.1, start=2.0, tolerance=0.03, evaluations=12)
    assert found.kl == pytest.approx(0.1, rel=0.03)
    assert len(calls) <= 12
    assert not found.unreached


def pairs_of(rows: int, start: int = 0) -> Preferences:
    names = [f"Ask {row}" for row in range(start, start + rows)]
    return Preferences(
        "preference",
        tuple(Example(name, "please, kindly") for name in names),
        tuple(Example(name, "three apples") for name in names),
        sha256=f"{start:064d}",
    )


def test_a_fitted_profile_is_not_calibrated_on_its_own_rows(lm: LanguageModel) -> None:
    own, other = pairs_of(40), pairs_of(40, start=100)
    profile = fit(lm, None, own, layers="1", name="kind", calibrate=False)
    trained, fresh = trained_and_fresh(profile, encode_corpus(lm.tokenizer, own, limit=None))
    assert trained is not None
    assert (trained.pairs.rows, fresh.pairs.rows) == (32, 8)
    encoded = encode_corpus(lm.tokenizer, other, limit=None)
    assert trained_and_fresh(profile, encoded) == (None, encoded)


def test_calibrating_again_meets_another_budget(lm: LanguageModel) -> None:
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", kl_budget=0.1)
    again = calibrate(lm, profile, pairs_of(40), CalibrationSettings(kl_budget=0.02, perplexity_bound=2.0))
    assert again.calibration["kl_at_1"] == pytest.approx(0.02, rel=0.03)
    assert again.calibration["perplexity_bound"] == 2.0
    assert again.unit < profile.unit
    assert torch.equal(again.directions[1], profile.directions[1])
    assert [one["strength"] for one in again.metrics["propensity"]["strengths"]] == [-1, 0, 1]


def test_another_model_is_refused(lm: LanguageModel) -> None:
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", calibrate=False)
    other = replace(lm, identity=replace(lm.identity, fingerprint="0" * 64))
    with pytest.raises(ProfileMismatch):
        calibrate(other, profile, pairs_of(40))
