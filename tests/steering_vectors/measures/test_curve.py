"""The curve over strengths: equal to a plain measurement, and the safe range read from it. Calibrating anew."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from steering_vectors.cli.app import register
from steering_vectors.data.chat import Example
from steering_vectors.data.corpus import encode_corpus
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import ProfileMismatch
from steering_vectors.fitting.fit import fit
from steering_vectors.fitting.recalibration import recalibrate, unseen
from steering_vectors.measures.curve import CurvePoint, measure_curve, measure_point, safe_strength
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

PROMPTS = [[0, *range(first, first + 4)] for first in range(20, 28)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def profile_for(lm: LanguageModel, unit: float) -> Profile:
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1))
    return Profile("test", lm.identity, {1: direction}, "mean-diff", unit=unit, residual_norms={1: 50.0})


def pairs_of(rows: int, start: int = 0) -> Preferences:
    names = [f"Ask {row}" for row in range(start, start + rows)]
    return Preferences(
        "preference",
        tuple(Example(name, "please, kindly") for name in names),
        tuple(Example(name, "three apples") for name in names),
        sha256=f"{start:064d}",
    )


def test_a_point_equals_a_plain_measurement(lm: LanguageModel) -> None:
    profile, tokens = profile_for(lm, 0.4), 6
    with steerable(lm) as steered:
        point = measure_point(steered, profile, -1.0, PROMPTS, tokens=tokens, seed=3)
        steered.write(profile, -1.0)
        texts = steered.sample(PROMPTS, tokens=tokens, seed=3)
    kl, likelihood, count = 0.0, 0.0, 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids, first = torch.tensor([[*prompt, *text]]), len(prompt) - 1

        def logs(ids: torch.Tensor = ids, first: int = first) -> torch.Tensor:
            with torch.no_grad():
                return lm.model(input_ids=ids, use_cache=False).logits[0, first:-1].log_softmax(-1)  # type: ignore[no-any-return]

        base = logs()
        with shifted(lm, {1: -profile.unit * profile.directions[1]}, first):
            changed = logs()
        kl += float((changed.exp() * (changed - base)).sum())
        likelihood += float(base.gather(1, torch.tensor(text).unsqueeze(1)).sum())
        count += len(text)
    assert point.kl == pytest.approx(kl / count, rel=1e-4)
    assert point.perplexity == pytest.approx(math.exp(-likelihood / count), rel=1e-4)


def test_a_curve_ends_at_the_first_magnitude_over_the_bound(lm: LanguageModel) -> None:
    with steerable(lm) as steered:
        short = measure_curve(steered, profile_for(lm, 8.0), PROMPTS, bound=1.05, tokens=6, seed=0)
        whole = measure_curve(steered, profile_for(lm, 0.01), PROMPTS, bound=1.5, tokens=6, seed=0)
    assert [point.strength for point in short] == [-0.5, 0.0, 0.5]
    assert [point.strength for point in whole] == sorted([0.0, *(s * m / 2 for s in (-1, 1) for m in range(1, 7))])
    assert whole[6] == CurvePoint(0.0, 0.0, whole[6].perplexity)


def points(*perplexities: float) -> list[CurvePoint]:
    """At 0, ±0.5, ±1, …: the + side as given, the − side without effect."""
    sides = [
        CurvePoint(sign * 0.5 * place, 0.0, value if sign > 0 else perplexities[0])
        for place, value in enumerate(perplexities)
        for sign in ((1,) if place == 0 else (-1, 1))
    ]
    return sorted(sides, key=lambda point: point.strength)


def test_the_safe_range() -> None:
    assert safe_strength(points(10.0, 11.0, 12.0, 13.0), 3.0) == 1.5
    assert safe_strength(points(10.0, 20.0, 45.0), 3.0) == 0.7  # 0.5 + 0.5 · log(1.5)/log(2.25)
    assert safe_strength(points(10.0, 1000.0), 3.0) == 0.1
    mirrored = [replace(point, strength=-point.strength) for point in points(10.0, 20.0, 45.0)]
    assert safe_strength(mirrored, 3.0) == 0.7


def test_a_fitted_profile_is_not_calibrated_on_its_own_rows(lm: LanguageModel) -> None:
    own, other = pairs_of(40), pairs_of(40, start=100)
    profile = fit(lm, None, own, layers="1", name="kind", calibrate=False)
    rest = unseen(profile, encode_corpus(lm.tokenizer, own, limit=None)).pairs
    assert rest.rows == 8
    assert unseen(profile, encode_corpus(lm.tokenizer, other, limit=None)).pairs == other


def test_recalibrating_meets_another_budget(lm: LanguageModel) -> None:
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", kl_budget=0.1)
    again = recalibrate(lm, profile, pairs_of(40), kl_budget=0.02, perplexity_bound=2.0)
    assert again.calibration["kl_at_1"] == pytest.approx(0.02, rel=0.03)
    assert again.calibration["perplexity_bound"] == 2.0
    assert again.unit < profile.unit
    assert torch.equal(again.directions[1], profile.directions[1])
    assert [one["strength"] for one in again.metrics["propensity"]["strengths"]] == [-1, 0, 1]


def test_recalibrating_on_another_model_is_refused(lm: LanguageModel) -> None:
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", calibrate=False)
    other = replace(lm, identity=replace(lm.identity, fingerprint="0" * 64))
    with pytest.raises(ProfileMismatch):
        recalibrate(other, profile, pairs_of(40))


def test_the_command_replaces_the_profile(lm: LanguageModel, tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    rows = [{"prompt": f"Ask {row}", "chosen": "please", "rejected": "apples"} for row in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", calibrate=False)
    save_profile(profile, tmp_path)
    command = ["calibrate", "kind", "--profiles", str(tmp_path), "--model", str(model), "--data", str(data)]
    result = CliRunner().invoke(app, [*command, "--kl-budget", "0.05", "--allow-model-mismatch", "--json"])
    assert result.exit_code == 0, result.output
    stored = load_profile(tmp_path / "kind.safetensors")
    printed = json.loads(result.stdout)
    assert printed["calibration"]["kl_budget"] == stored.calibration["kl_budget"] == 0.05
    assert stored.max_strength == printed["max_strength"]
    bad = CliRunner().invoke(app, [*command, "--perplexity-bound", "1", "--allow-model-mismatch"])
    assert bad.exit_code == 2
    assert "the perplexity bound must be a factor above 1" in bad.stderr
