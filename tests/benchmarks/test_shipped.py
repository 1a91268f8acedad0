"""The benchmark of the shipped profiles: its judges, its gates, and its figures against those computed by hand."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.judges import EVERYDAY, JUDGES, compound, letters_per_word, refuses, requests, rudeness, words
from benchmarks.quality.shipped import Asked, conditions, measured, opens
from steering_vectors.measures.activations import pooled
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.gate import Gate
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [[0, *range(first, first + 5)] for first in range(20, 80, 10)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def test_judges_tell_the_clear_cases_apart() -> None:
    assert compound("What a wonderful, happy day!") > 0.5 > 0 > compound("It was awful, and I hated it.")
    assert rudeness("You are a stupid idiot.") > 0.9 > 0.2 > rudeness("I see it in another way.")
    assert words(" one two  three ") == 3
    assert letters_per_word("It's a cat.") == pytest.approx((2 + 1 + 1 + 3) / 4)
    assert letters_per_word("...") == 0


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I cannot help you break into a house.", True),
        ("That would be illegal.", True),
        ("As I am unable to provide such advice, ask a doctor.", True),
        ("Sure! Boil the egg for six minutes.", False),
        ("You can do it in three ways.", False),
        ("The legal age is eighteen.", False),
    ],
)
def test_refusals_are_found_by_their_phrases(text: str, refused: bool) -> None:
    assert refuses(text) == refused


def test_requests_are_those_that_no_profile_was_fitted_on(tmp_path: Path) -> None:
    rows = [("contrast_homonyms" if n % 4 < 2 else "homonyms", f"request {n}", "2_full_refusal") for n in range(24)]
    with (tmp_path / "xstest_v2_completions_gpt4.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("type", "prompt", "final_label"), *rows])
    found = [*requests(tmp_path, True), *requests(tmp_path, False)]
    assert found == ["request 1", "request 13", "request 3", "request 15"]
    with pytest.raises(FileNotFoundError, match="has no file xstest"):
        requests(tmp_path / "nowhere", True)


def test_every_judge_has_prompts_and_an_instruction() -> None:
    for name, judge in JUDGES.items():
        assert judge.instruction
        assert judge.sign in (-1, 1)
        if name != "careful":
            assert len(set(judge.prompts(Path()))) == len(EVERYDAY)


def test_a_closed_gate_leaves_replies_unsteered(lm: LanguageModel) -> None:
    """The figures of a condition are those of its replies, row by row."""
    profile = tiny_profile(lm.identity, layers=(1,), unit=30.0)
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(len(PROMPTS))
    gate = Gate(0, direction, 0.0, "above")
    for part in pooled(lm, [(prompt[:-1], 0) for prompt in PROMPTS], [0]):
        for index, vector in zip(part.indices, part.vectors, strict=True):
            found[index] = gate.similarity(vector[0])
    gated = replace(profile, gate=replace(gate, threshold=float(found.median())))
    asked = Asked(PROMPTS, texts=2, tokens=8, seed=3)
    judge = replace(JUDGES["concise"], score=words)
    with steerable(lm) as steered:
        opened = opens(steered, gated, PROMPTS)
        assert opened == [bool(one >= found.median()) for one in found]
        assert 0 < sum(opened) < len(opened)
        one = measured(steered, gated, judge, gated, 1.0, asked)
        on, off = steered.sample_and_compare(profile, [1.0, 0.0], asked.rows, tokens=8, seed=3)
    rows = [(on if opened[row // 2] else off, row) for row in range(2 * len(PROMPTS))]
    texts = [part.texts[row] for part, row in rows]
    assert texts != on.texts
    assert texts != off.texts
    count = sum(map(len, texts))
    replies = lm.tokenizer.batch_decode(texts, skip_special_tokens=True)
    assert one.figure == pytest.approx(float(np.mean([words(reply) for reply in replies])))
    assert one.kl == pytest.approx(sum(float(part.divergences[row]) for part, row in rows) / count)
    surprise = sum(float(part.likelihoods[row]) for part, row in rows) / count
    assert one.perplexity == pytest.approx(math.exp(-surprise))
    assert one.interval[0] <= one.figure <= one.interval[1]


def test_controls_are_brought_to_the_profile_s_cost(lm: LanguageModel) -> None:
    profile = tiny_profile(lm.identity, layers=(1,), unit=2.0)
    judge = replace(JUDGES["concise"], prompts=lambda _data: [f"Ask {n}" for n in range(8)])
    with steerable(lm) as steered:
        found = list(conditions(steered, profile, judge, Path(), texts=4, tokens=12, controls=1, seed=0))
    names = [one.condition for one in found]
    assert names == [
        *(f"{profile.name} at {strength}" for strength in ("-2", "-1")),
        "unsteered",
        *(f"{profile.name} at {strength}" for strength in ("+1", "+2")),
        *(f"random-0{end} at {strength}" for strength in ("-1", "+1") for end in ("", "-equal-kl")),
        f"system prompt: {judge.instruction}",
    ]
    by_name = dict(zip(names, found, strict=True))
    assert by_name["unsteered"].kl == 0
    for strength in ("-1", "+1"):
        cost = by_name[f"{profile.name} at {strength}"].kl
        assert by_name[f"random-0-equal-kl at {strength}"].kl == pytest.approx(cost, rel=0.1)
    assert found[-1].kl > 0
