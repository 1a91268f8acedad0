"""The benchmark of long texts: hooks steer as profiles do, and its figures equal those computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import long_texts
from benchmarks.quality.long_texts import Direction, Figures, Way, at_equal_effect, hooked, measure, perplexities
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.mixture import Mixture, Term
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [[0, *range(first, first + 3 + first % 3)] for first in range(20, 28)]
TOKENS = 9


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def direction_for(lm: LanguageModel) -> Direction:
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.4)
    return Direction(1, profile.unit * profile.directions[1], 0.5, 3.0)


def test_a_hooked_constant_shift_writes_the_texts_of_the_profile(lm: LanguageModel) -> None:
    profile, direction = tiny_profile(lm.identity, layers=(1,), unit=0.4), direction_for(lm)
    strengths = (0.0, -1.5, 1.0)
    numbers = torch.rand(len(PROMPTS), TOKENS, generator=torch.Generator().manual_seed(3))
    with steerable(lm) as steered:
        sampled = steered.sample_and_compare(profile, strengths, PROMPTS, tokens=TOKENS, seed=3, compared=0)
    expected = [one.texts for one in sampled]
    with hooked(lm, 16) as sampler:
        ways = {Mixture((Term(profile, 0.0),)): Way("constant", strength) for strength in strengths}
        assert sampler.write_texts(lm, direction, ways, PROMPTS, numbers) == expected
    assert expected[0] != expected[1]


def test_each_way_changes_a_row_as_it_says(lm: LanguageModel) -> None:
    direction = direction_for(lm)
    hidden = torch.randn(1, lm.hidden_size, generator=torch.Generator().manual_seed(5))
    unit = direction.shift / direction.shift.norm()

    def added(name: str, strength: float, step: int = 0) -> torch.Tensor:
        return (direction.steer(hidden, [Way(name, strength)], [step]) - hidden)[0]

    for name, step, factor in (
        ("constant", 999, 1), ("decay", 0, 1), ("decay", 32, 0.75), ("decay", 200, 0), ("first", 47, 1),
        ("first", 48, 0), ("scaled", 7, float(hidden.norm()) / 3.0),
    ):  # fmt: skip
        torch.testing.assert_close(added(name, -2.0, step), -2 * factor * direction.shift, atol=1e-5, rtol=1e-4)
    for strength in (9.0, -9.0):  # both beyond where h is
        steered = direction.steer(hidden, [Way("clamp", strength)], [0])[0]
        target = 0.5 + strength * float(direction.shift.norm())
        assert float(steered @ unit) == pytest.approx(target, abs=1e-3)
        across = hidden[0] - (hidden[0] @ unit) * unit
        torch.testing.assert_close(steered - (steered @ unit) * unit, across, atol=1e-4, rtol=1e-4)
    along = (float(hidden[0] @ unit) - 0.5) / float(direction.shift.norm())
    for strength in (along - 0.1, along + 0.1):  # h is on the wanted side already
        away = strength > 0
        expected = (strength > along) if away else (strength < along)
        assert bool(added("clamp", strength).abs().max() > 1e-6) == expected


def test_rows_of_several_ways_are_steered_each_in_its_own(lm: LanguageModel) -> None:
    direction, hidden = direction_for(lm), torch.zeros(3, lm.hidden_size)
    found = direction.steer(hidden, [Way("first", 1.0), Way("constant", 0.5), Way("first", 1.0)], [0, 60, 60])
    expected = torch.stack([direction.shift, 0.5 * direction.shift, torch.zeros(lm.hidden_size)])
    torch.testing.assert_close(found, expected)


def test_perplexity_by_position(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "BOUNDARIES", (2, 100))
    examples = [([0, 9, 30, 31, 32, 33], 2), ([0, 8, 7, 40], 3)]
    with steerable(lm) as steered:
        found = perplexities(steered, examples)
    early, late = [], []
    for ids, start in examples:
        with torch.no_grad():
            logs = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        chosen = [float(logs[place - 1, ids[place]]) for place in range(start, len(ids))]
        early += chosen[:2]
        late += chosen[2:]
    assert found == {
        2: pytest.approx(math.exp(-sum(early) / len(early)), rel=1e-4),
        4: pytest.approx(math.exp(-sum(late) / len(late)), rel=1e-4),
    }


def test_late_scores_are_means_over_parts() -> None:
    seen: list[int] = []

    def score(part: list[int]) -> float:
        seen.append(len(part))
        return float(part[0])

    assert long_texts._late(list(range(48 * 2 + 16)), score) == (48 + 96) / 2
    assert seen == [48, 16]
    assert math.isnan(long_texts._late(list(range(48 + 15)), score))


def test_all_ways_are_measured_at_both_signs(lm: LanguageModel) -> None:
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.4, residual_norms={1: 3.0})
    rows = [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    with steerable(lm) as steered:
        found = list(measure(steered, profile, rows, ["constant", "clamp"], 2, TOKENS, 0))
    assert [(one.way, one.strength) for one in found] == [
        ("unsteered", 0.0),
        *((way, strength) for way in ("constant", "clamp") for strength in (-1.0, 1.0, -2.0, 2.0)),
    ]
    assert all(one.texts == 6 and one.late_texts == 0 for one in found)


def test_the_interpolation_to_an_equal_effect() -> None:
    plain = Figures("unsteered", 0.0, 8, 0.5, 0.0, {9: 10.0}, 0.1, (0, 0), 0.0, (0, 0), 8, "")

    def pair(strength: float, early: float, late: float, ended: float) -> list[Figures]:
        one = replace(plain, way="first", strength=strength, early=early, late=late, ended=ended, perplexity={9: 30.0})
        return [replace(one, strength=-strength, early=-early, late=-late, ended=0.5, perplexity={9: 20.0}), one]

    found = [plain, *pair(1.0, 0.2, 0.1, 0.4), *pair(2.0, 0.6, 0.2, 0.2)]
    assert at_equal_effect(found, "first", 0.8) == pytest.approx(
        {"strength": 1.5, "effect": 0.8, "late effect": 0.3, "ended": 0.3, "repeating": 0.0, "perplexity to 9": 30.0}
    )
    assert at_equal_effect(found, "first", 0.2) == pytest.approx(
        {"strength": 0.5, "effect": 0.2, "late effect": 0.1, "ended": 0.45, "repeating": 0.0, "perplexity to 9": 20.0}
    )
    assert at_equal_effect(found, "first", 1.3) is None
