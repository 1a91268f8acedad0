"""The curve over strengths equals a plain measurement and gives the safe range."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steering_vectors.measures.curve import CurvePoint, measure_curve, measure_points, safe_strength
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
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


def test_a_point_equals_a_plain_measurement(lm: LanguageModel) -> None:
    """Points that are measured together are those of one strength after the other."""
    profile, tokens = profile_for(lm, 0.4), 6
    with steerable(lm) as steered:
        still, point, other = measure_points(steered, profile, [0.0, -1.0, 0.5], PROMPTS, tokens=tokens, seed=3)
        assert measure_points(steered, profile, [0.0], PROMPTS, tokens=tokens, seed=3) == [approximately(still)]
        assert measure_points(steered, profile, [0.5], PROMPTS, tokens=tokens, seed=3) == [approximately(other)]
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


def approximately(point: CurvePoint) -> CurvePoint:
    return replace(point, kl=pytest.approx(point.kl, rel=1e-4), perplexity=pytest.approx(point.perplexity, rel=1e-4))


def test_a_curve_ends_at_the_first_magnitude_over_the_bound(lm: LanguageModel) -> None:
    """Half a step before that magnitude is measured too."""
    profile = profile_for(lm, 2.0)
    with steerable(lm) as steered:
        still, *around = measure_points(steered, profile, [0.0, -1.0, 1.0, -2.0, 2.0], PROMPTS, tokens=6, seed=0)
        at_1, at_2 = (max(one.perplexity for one in both) / still.perplexity for both in (around[:2], around[2:]))
        bounds = (0.99 * at_1, 0.99 * at_2, 1e9)
        curves = [measure_curve(steered, profile, PROMPTS, bound=bound, tokens=6, seed=0) for bound in bounds]
    assert 1 < at_1 < at_2
    assert [[point.strength for point in curve] for curve in curves] == [
        [-1.0, -0.5, 0.0, 0.5, 1.0],
        [-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0],
        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0],
    ]
    assert curves[0][2] == CurvePoint(0.0, 0.0, approximately(still).perplexity)


def points(*perplexities: float) -> list[CurvePoint]:
    """Points at 0, ±0.5, ±1, …: the positive side as given, the negative side without an effect."""
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
