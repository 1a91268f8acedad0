"""Figures of long texts equal those computed by hand, and the safe range follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering_vectors.measures import long_texts
from steering_vectors.measures.long_texts import (
    faults,
    is_endless,
    is_repeating,
    measure_long_texts,
    repeated_share,
    safe_range,
    tells_endings,
)
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.metadata import LongTextPoint, faults_beyond
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

PROMPTS = [[0, *range(first, first + 4)] for first in range(20, 28)]
TOKENS = 12


def lm_of(architecture: str) -> LanguageModel:
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    (end,) = eos_ids(lm)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[end] *= 6  # so that some texts end
    return lm


def profile_for(lm: LanguageModel) -> Profile:
    draw = torch.Generator().manual_seed(1)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (0, 1)}
    return Profile("test", lm.identity, directions, "mean-diff", unit=0.4)


@pytest.mark.parametrize("architecture", ["llama", "rwkv"])
def test_a_point_equals_passes_over_each_text(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a model whose texts are written first and read afterwards."""
    monkeypatch.setattr(long_texts, "BOUNDARIES", (0, 3, 7, 100))
    lm = lm_of(architecture)
    profile, ends = profile_for(lm), eos_ids(lm)
    with steerable(lm) as steered:
        points = measure_long_texts(steered, profile, [0.0, -1.5, 1.0], PROMPTS, tokens=TOKENS, seed=3)
        sampled = steered.sample_and_compare(profile, [0.0, -1.5, 1.0], PROMPTS, tokens=TOKENS, seed=3)
    assert [point["strength"] for point in points] == [0.0, -1.5, 1.0]
    for point, texts in zip(points, (one.texts for one in sampled), strict=True):
        shifts = {layer: point["strength"] * profile.unit * d for layer, d in profile.directions.items()}
        kl, likelihood = ([[] for _ in range(TOKENS)] for _ in range(2))
        for prompt, text in zip(PROMPTS, texts, strict=True):
            base = logs_of(lm, {}, prompt, text)
            changed = logs_of(lm, shifts, prompt, text)
            for step, token in enumerate(text):
                kl[step].append(float((changed[step].exp() * (changed[step] - base[step])).sum()))
                likelihood[step].append(float(base[step, token]))
        assert point["ended"] == sum(text[-1] in ends for text in texts) / len(texts)
        spans = [(one["start"], one["end"]) for one in point["positions"]]
        assert spans == [(0, 3), (3, 7), (7, TOKENS)][: len(spans)]
        for one in (*point["positions"], {**point, "start": 0, "end": TOKENS, "tokens": sum(map(len, texts))}):
            values = [value for step in kl[one["start"] : one["end"]] for value in step]
            logs = [value for step in likelihood[one["start"] : one["end"]] for value in step]
            assert one["tokens"] == len(values)
            assert one["kl"] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-5)
            assert one["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-3)
    assert any(0 < point["ended"] < 1 for point in points)
    assert points[0]["shift_ratio"] == points[0]["kl"] == 0


def logs_of(
    lm: LanguageModel, shifts: dict[int, torch.Tensor], prompt: Sequence[int], text: Sequence[int]
) -> torch.Tensor:
    with torch.no_grad(), shifted(lm, shifts, len(prompt) - 1):
        logits = lm.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0].float()
    found: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found


def test_the_shift_s_ratio_is_that_at_the_block_where_it_is_largest() -> None:
    lm = lm_of("llama")
    profile = profile_for(lm)
    with steerable(lm) as steered:
        (point,) = measure_long_texts(steered, profile, [-2.0], PROMPTS, tokens=TOKENS, seed=3, compared=5)
        (sampled,) = steered.sample_and_compare(profile, [-2.0], PROMPTS, tokens=TOKENS, seed=3)
    norms: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for prompt, text in zip(PROMPTS[:5], sampled.texts, strict=False):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *text[:-1]]])
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer, found in norms.items():
            found.append(states[layer + 1][0, len(prompt) :].norm(dim=-1))
    ratios = [2 * profile.shift_norms()[layer] / float(torch.cat(found).mean()) for layer, found in norms.items()]
    assert point["shift_ratio"] == pytest.approx(max(ratios), rel=1e-3)


def test_repeated_4_grams() -> None:
    assert repeated_share([1, 2, 3]) == repeated_share(range(64)) == 0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repeated_share([7] * 10) == pytest.approx(6 / 7)


def test_what_repeats_is_judged_by_its_last_tokens() -> None:
    loop = [1, 2, 3, 4, 5] * 20
    assert is_repeating(loop)
    assert is_repeating([*range(200, 400), *loop])
    assert not is_repeating([*loop, *range(200, 300)])
    assert not is_repeating(list(range(32)) + list(range(32)))  # 29 of 61 occurred before


@pytest.mark.parametrize(
    ("text", "endless"),
    [
        ("a text of short words " * 10, False),
        ("so " + "wonderful" * 7, True),
        ("so " + "-".join(["V"] * 40), True),
        ("x" * 60, False),
        ("今天天气很好我们去公园散步" * 8, False),
        ("ประเทศไทยมีอากาศร้อน" * 8, False),
    ],
)
def test_an_endless_word(text: str, endless: bool) -> None:
    assert is_endless([1], lambda _ids: text) == endless


def test_an_endless_word_is_looked_for_in_the_last_tokens() -> None:
    assert is_endless(range(100), lambda ids: "a" * len(ids))
    read: list[Sequence[int]] = []
    assert not is_endless(range(100), lambda ids: read.append(ids) or "")  # type: ignore[func-returns-value]
    assert read == [range(36, 100)]


def point(strength: float, *, ended: float = 0.5, repeating: float = 0.0, perplexity: float = 10.0) -> LongTextPoint:
    return {
        "strength": strength, "kl": 0.0, "perplexity": perplexity, "ended": ended, "repeating": repeating,
        "shift_ratio": 0.0, "positions": [],
    }  # fmt: skip


def test_the_faults_of_a_strength() -> None:
    plain = point(0, ended=0.5, repeating=0.125)

    def found(**figures: float) -> list[str]:
        return faults(point(1, **{"repeating": 0.125, **figures}), plain, texts=16, bound=3)

    assert found() == found(ended=1.0, repeating=0.0, perplexity=30.0) == []
    assert found(perplexity=30.1) == ["perplexity"]
    assert found(ended=4 / 16) == []  # .25 less is within .1 and the error of .165
    assert found(ended=3 / 16) == ["endings"]  # .3125 less, and the error is .158
    assert found(repeating=4 / 16) == []  # twice
    assert found(repeating=5 / 16) == ["repetition"]
    assert found(ended=0.0, repeating=1.0, perplexity=31.0) == ["perplexity", "endings", "repetition"]
    none = point(0, repeating=0.0)
    assert faults(point(1, repeating=1 / 16), none, texts=16) == []
    assert faults(point(1, repeating=2 / 16), none, texts=16) == ["repetition"]


def test_endings_of_a_model_that_ends_no_text_say_nothing() -> None:
    assert faults(point(1, ended=0.0), point(0, ended=0.0), texts=16) == []
    shares = [count / 16 for count in range(17)]
    told = [tells_endings(point(0, ended=share), texts=16) for share in shares]
    assert told == [share > 0.2 for share in shares]
    assert told == [faults(point(1, ended=0.0), point(0, ended=share), texts=16) == ["endings"] for share in shares]


def searched(widest: float, *limits: float) -> tuple[tuple[float, float], list[list[float]]]:
    """The range found if texts repeat beyond a limit below 0 and one above it, and what was measured."""
    calls: list[list[float]] = []

    def measure(strengths: Sequence[float]) -> list[LongTextPoint]:
        calls.append(list(strengths))
        return [point(one, repeating=float(one < -limits[0] or one > limits[1])) for one in strengths]

    safe, points = safe_range(measure, widest, texts=16)
    assert [one["strength"] for one in points] == sorted(strength for call in calls for strength in call)
    for one in points:
        wrong = one["strength"] < -limits[0] or one["strength"] > limits[1]
        assert one.get("faults", []) == (["repetition"] if wrong else [])
    return safe, calls


def test_the_search_for_the_safe_range() -> None:
    first = [0, -1, 1, -2.6, 2.6]
    assert searched(2.6, 3, 3) == ((-2.6, 2.6), [first])
    assert searched(2.6, 3, 2) == ((-2.6, 1.8), [first, [1.8]])
    assert searched(2.6, 1.5, 2) == ((-1.4, 1.8), [first, [-1.8, 1.8], [-1.4]])
    assert searched(1.9, 0.9, 1.1) == ((-0.7, 1.0), [[0, -1, 1, -1.9, 1.9], [-0.5, 1.4], [-0.7]])
    assert searched(2.6, 1.0, 0.4) == ((-1.0, 0.3), [first, [-1.8, 0.5], [-1.4, 0.2], [0.3]])
    assert searched(1.0, 1.0, 0.9) == ((-1.0, 0.7), [[0, -1, 1], [0.5], [0.7]])
    assert searched(3.0, 0.05, 3) == ((0.0, 3.0), [[0, -1, 1, -3, 3], [-0.5], [-0.2]])
    assert searched(0.3, 0.0, 1) == ((0.0, 0.3), [[0, -0.3, 0.3], [-0.1]])
    assert searched(0.3, 0.1, 1) == ((-0.1, 0.3), [[0, -0.3, 0.3], [-0.1]])
    assert searched(0.2, 1, 0.1) == ((-0.2, 0.0), [[0, -0.2, 0.2]])


def test_a_fault_below_strengths_without_faults_ends_the_range() -> None:
    """Faults at 1 and none at 2 say that the range ends below 1, wherever 2 comes from."""
    safe, points = safe_range(lambda found: [point(one, repeating=float(abs(one) == 1)) for one in found], 2, texts=16)
    assert safe == (-0.7, 0.7)
    assert [one["strength"] for one in points] == [-2, -1, -0.7, -0.5, 0, 0.5, 0.7, 1, 2]


def test_the_faults_next_beyond_a_range() -> None:
    points = [point(one) | {"faults": [str(one)] if one not in (-0.5, 1) else []} for one in (-2, -1, -0.5, 1, 1.5, 2)]
    check: Any = {"points": [*points[:3], point(0), *points[3:]]}
    assert [one["strength"] for one in faults_beyond(check, (-0.5, 1))] == [-1, 1.5]
    assert [one["strength"] for one in faults_beyond(check, (-2, 1.5))] == [2]
    assert faults_beyond(check, (-3, 3)) == []
