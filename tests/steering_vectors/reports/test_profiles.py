"""The HTML page of profiles: its headline, its plots, and that it needs no other file."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from steering_vectors.profiles.files import profile_summary
from steering_vectors.profiles.profile import ModelIdentity, Profile
from steering_vectors.reports.profiles import block_cosines, common_cosines, headline, labelled, render_portraits

MODEL = ModelIdentity("tiny", "LlamaForCausalLM", 4, 3, "f" * 64)
CURVE = [{"strength": s, "kl": 0.1 * s * s, "perplexity": 10.0 + s * s} for s in (-2.0, -1.0, 0.0, 1.0, 2.0)]
CALIBRATION = {"kl_budget": 0.1, "kl_at_1": 0.1, "perplexity_bound": 3.0, "curve": CURVE}
METRICS = {
    "propensity": {
        "unit": "nats per response",
        "rows": 8,
        "strengths": [{"strength": s, "margin": 2 * s, "accuracy": 0.5 + s / 4} for s in (-1.0, 0.0, 1.0)],
    },
    "notes": ["only 40 rows: <noisy>"],
}


def profile(name: str = "warm", layers: tuple[int, ...] = (0, 1), seed: int = 0, **fields: Any) -> Profile:
    draw = torch.Generator().manual_seed(seed)
    known = {
        "model": MODEL,
        "calibration": CALIBRATION,
        "metrics": METRICS,
        "max_strength": 1.7,
        "residual_norms": {0: 2.0, 1: 3.0},
    }
    directions = {layer: torch.randn(4, generator=draw) for layer in layers}
    return Profile(name=name, directions=directions, method="mean-diff", **{**known, **fields})


def text_of(page: str) -> str:
    return html.unescape(page)


@pytest.mark.slow
def test_the_page_stands_alone_and_begins_with_the_sentence() -> None:
    one = profile()
    page = render_portraits([one])
    assert page.count("<svg") == 4
    assert not re.search(r'(?:src|href)="(?!#)', page)
    first = re.search(r"<p[^>]*>(.*?)</p>", page, re.S)
    assert first is not None
    assert text_of(first[1]) == headline(one)
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert stored is not None
    assert json.loads(stored[1]) == [profile_summary(one)]
    assert "<li>only 40 rows: &lt;noisy&gt;</li>" in page
    assert MODEL.fingerprint in page


def test_the_headline_describes_a_profile_and_its_range() -> None:
    assert headline(profile()) == (
        "warm (mean-diff) adds its direction at blocks 0, 1 of tiny, from the last prompt token on; strength 1 costs "
        "0.1 nats of KL per token, and strengths of ±1.7 are safe (perplexity within 3 times the unsteered)."
    )
    bare = profile(layers=(2,), calibration={}, metrics={}, residual_norms={}, operator="ablate", apply_to="all")
    assert headline(bare) == (
        "warm (mean-diff) removes its direction at block 2 of tiny, everywhere; it is not calibrated, so the cost of "
        "strength 1 is unknown, and strengths of ±1.7 are allowed, but the range was not measured."
    )
    assert render_portraits([bare]).count("<svg") == 1


def test_cosines_are_those_of_the_stored_directions() -> None:
    one, other = profile(layering="incremental"), profile(layers=(1, 2), seed=1)
    a, b = one.directions[0], one.directions[1]
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    found = block_cosines(one)
    assert torch.allclose(found, torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64), atol=1e-6)
    between = float(torch.nn.functional.cosine_similarity(b, other.directions[1], dim=0))
    assert common_cosines(one, other) == {1: pytest.approx(between, abs=1e-6)}
    assert common_cosines(one, replace(other, model=replace(MODEL, fingerprint="0" * 64))) == {}


@pytest.mark.slow
def test_several_profiles_are_compared_where_they_can_be() -> None:
    near, far = profile("kind", seed=1), profile("elsewhere", model=replace(MODEL, fingerprint="0" * 64))
    high = profile("high", layers=(2,), residual_norms={})
    page = text_of(render_portraits([profile(), near, far, high]))
    mean = sum(common_cosines(profile(), near).values()) / 2
    assert f"<td>warm and kind</td><td>{mean:+.3f}</td>" in page
    assert "warm and elsewhere belong to different models, so their directions cannot be compared." in page
    assert "warm and high have no block in common." in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


def test_equal_names_get_different_labels() -> None:
    old, new = profile(version="a" * 64), profile(version="b" * 64)
    assert list(labelled([old, new])) == ["warm#aaaaaaaa", "warm#bbbbbbbb"]
    assert list(labelled([old, old])) == ["warm#aaaaaaaa", "warm#aaaaaaaa (2)"]
    assert list(labelled([old, profile("kind")])) == ["warm", "kind"]
