"""The benchmarks of quality: their arithmetic against values computed by hand, their verdicts, the judge's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import bad_pairs, dose_response, sentiment
from benchmarks.quality.conditions import Instructed, Weights, mean_divergence, measure
from benchmarks.quality.equal_kl import at_equal_kl, kl_on
from benchmarks.quality.gguf_agreement import Agreement, agreement
from benchmarks.quality.manners import MANNERS, judge
from benchmarks.rivals.rahf_report import marks_of, share, summary
from benchmarks.speed.quantization import compared
from steering_vectors.data.corpus import Sides
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

STEPS = dose_response.STRENGTHS
PROMPTS = [[0, *range(first, first + 4)] for first in range(20, 44)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def logs(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


# The judge


@pytest.mark.parametrize(
    ("reply", "ended"),
    [
        ("", True),
        ("The", True),
        ("Yes.", True),
        ("Mix the flour with", True),
        ("Mix flour and water. Wait.", False),
        ("Mix mix mix the flour.", True),
        ("Mix it. Mix it. Mix it. Mix it.", True),
        ("Mix flour\ufffd and water.", True),
    ],
)
def test_what_is_no_concise_reply(reply: str, ended: bool) -> None:
    assert not judge("concise", reply, ended=ended)


@pytest.mark.parametrize("reply", ["Mix flour and water.", "Is it done?", 'He said: "Mix flour and water."'])
def test_what_is_a_concise_reply(reply: str) -> None:
    assert judge("concise", reply)


def test_a_broken_reply_shows_no_manner() -> None:
    assert judge("warm", "Well done, my dear friend!")
    assert judge("warm", "Well done, my dear friend", ended=False)
    assert not judge("warm", "dear dear dear dear dear")
    assert not any(judge(manner, "") for manner in MANNERS)


# Dose and response


def doses(*shares: float) -> dict[float, float]:
    return dict(zip(STEPS, shares, strict=True))


def drawn(norm: tuple[float, float], kl: tuple[float, float]) -> dict[str, dict[float, list[float]]]:
    """Shares of one random direction of each kind, at -1 and 1."""
    return {kind: {-1.0: [low], 1.0: [high]} for kind, (low, high) in (("equal norm", norm), ("equal KL", kl))}


RISING = doses(0.2, 0.3, 0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("shares", "random", "holds"),
    [
        (RISING, drawn((0.3, 0.5), (0.21, 0.59)), True),
        (doses(0.2, 0.4, 0.4, 0.5, 0.6), drawn((0.3, 0.5), (0.3, 0.5)), False),  # a step that does not rise
        (doses(0.2, 0.5, 0.4, 0.5, 0.6), drawn((0.3, 0.5), (0.3, 0.5)), False),  # one that falls
        (doses(0.31, 0.35, 0.4, 0.5, 0.6), drawn((0.4, 0.5), (0.4, 0.5)), False),  # 0.29 in all
        (RISING, drawn((0.3, 0.5), (0.3, 0.6)), False),  # a random one of equal KL does as much
        (RISING, drawn((0.2, 0.5), (0.3, 0.5)), False),
        (RISING, drawn((0.6, 0.5), (0.3, 0.5)), False),  # at the other sign
    ],
)
def test_when_a_dose_response_holds(shares: dict[float, float], random: Any, holds: bool) -> None:
    assert dose_response.verdict(shares, random)["holds"] is holds


def test_only_replies_that_ended_are_concise() -> None:
    answers = [
        {"text": "Mix flour and water.", "finish_reason": "stop"},
        {"text": "Mix flour and water.", "finish_reason": "length"},
    ]
    assert dose_response.judged("concise", answers).tolist() == [1.0, 0.0]


# Sentiment


def test_shares_of_words() -> None:
    assert sentiment.word_counts("A HAPPY friend; not sad. Happiness?") == (2, 2)
    assert sentiment.share(np.array([[3, 1], [0, 4]])) == 3 / 8  # pooled, not 3/4 and 0 averaged
    assert sentiment.share(np.zeros((2, 2))) == 0


UP = [(0.01, 0.1)] * 4
SHARES = doses(0.4, 0.5, 0.6, 0.7, 0.8)


@pytest.mark.parametrize(
    ("shares", "steps", "random", "holds"),
    [
        (SHARES, UP, drawn((0.5, 0.7), (0.5, 0.79)), True),
        (SHARES, [*UP[:3], (-0.1, 0.02)], drawn((0.5, 0.7), (0.5, 0.7)), True),  # perhaps down, not significantly
        (SHARES, [*UP[:3], (-0.1, -0.01)], drawn((0.5, 0.7), (0.5, 0.7)), False),
        (doses(0.66, 0.7, 0.7, 0.7, 0.8), UP, drawn((0.7, 0.7), (0.7, 0.7)), False),  # 0.14 in all
        (SHARES, UP, drawn((0.5, 0.7), (0.5, 0.8)), False),  # equal KL is as far up
        (SHARES, UP, drawn((0.81, 0.7), (0.5, 0.7)), False),  # the other sign is further up
        (SHARES, UP, drawn((0.5, 0.7), (0.75, 0.3)), False),  # a random one moves more, downwards
    ],
)
def test_when_sentiment_holds(shares: dict[float, float], steps: Any, random: Any, holds: bool) -> None:
    assert sentiment.verdict(shares, steps, random)["holds"] is holds


def test_what_is_told_beside_the_verdict() -> None:
    found = sentiment.verdict(SHARES, UP, drawn((0.39, 0.7), (0.5, 0.7)))
    assert found["holds"]
    assert not found["below_random"]
    assert found["random_rise"] == pytest.approx(0.31)


# Controls


def test_controls_cost_what_the_profile_costs_on_the_same_prompts(lm: LanguageModel) -> None:
    draw = torch.Generator().manual_seed(1)
    profile = Profile("it", lm.identity, {1: torch.randn(lm.hidden_size, generator=draw)}, "mean-diff")
    profile = replace(profile, unit=0.3, residual_norms={1: 50.0}, max_strength=1.5)
    budget = kl_on(lm, profile, PROMPTS, tokens=6)
    (control,) = at_equal_kl(lm, random_controls(profile, 1), PROMPTS, budget, tokens=6)
    assert control.name == "equal-kl-0"
    assert control.max_strength == 1.5
    assert kl_on(lm, control, PROMPTS, tokens=6, seed=1) == pytest.approx(budget, rel=0.1)


# Conditions


def test_a_mean_divergence_is_over_positions() -> None:
    """½ ln(½ ÷ ¼) + ½ ln(½ ÷ ¾) = ½ ln(4 ÷ 3) at one of three positions, 0 at the others."""
    apart, same = (logs([0.5, 0.5]), logs([0.25, 0.75])), (logs([0.1, 0.9], [0.3, 0.7]),) * 2
    assert mean_divergence([apart, same]) == pytest.approx(math.log(4 / 3) / 6, rel=1e-5)
    assert mean_divergence([]) == 0


def by_hand(first: Any, second: Any, examples: list[tuple[list[int], list[int], list[int]]]) -> float:
    """Mean KL(first‖second) of replies: each example is a prompt for either model, and the reply."""
    found = []
    with torch.no_grad():
        for one, other, reply in examples:
            p, q = (
                model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model, prompt in ((first, one), (second, other))
            )
            found += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(found) / len(found)


REPLIES = [([0, 30, 31], [40, 41, 42, 43]), ([0, 50], [60, 61])]


def test_the_divergence_of_an_instruction(lm: LanguageModel) -> None:
    with steerable(lm) as plain:
        found = Instructed(plain, lambda prompt: [0, 70, 71, *prompt]).divergence(
            [([*prompt, *reply], len(prompt)) for prompt, reply in REPLIES]
        )
    examples = [([0, 70, 71, *prompt], prompt, reply) for prompt, reply in REPLIES]
    assert found == pytest.approx(by_hand(lm.model, lm.model, examples), rel=1e-4)
    assert found > 1e-3


def test_the_divergence_of_changed_weights(lm: LanguageModel) -> None:
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    with steerable(lm) as plain, steerable(wrap_model(changed, tiny_tokenizer())) as tuned:
        found = Weights(tuned, plain).divergence([([*prompt, *reply], len(prompt)) for prompt, reply in REPLIES])
    assert found == pytest.approx(by_hand(changed, lm.model, [(p, p, r) for p, r in REPLIES]), rel=1e-4)
    assert found > 1e-3


def test_the_judge_hears_which_replies_ended(lm: LanguageModel) -> None:
    heard = []

    def judge_of(text: str, ended: bool) -> bool:
        heard.append(ended)
        return ended

    class Written(Instructed):
        def write(self, prompts: Any, *, tokens: int, seed: int) -> list[list[int]]:
            return [[40, 41, 1], [40, 41, 42]]  # 1 ends a text

    with steerable(lm) as plain:
        pairs = Sides((([0, 30, 31], 1),), (([0, 30, 32], 1),), True)
        condition = Written(plain, lambda prompt: prompt)
        found = measure(condition, plain, [[0, 30], [0, 31]], pairs, judge_of, tokens=3, seed=0)
    assert heard == [True, False]
    assert (found["marks"], found["share"], found["ended"], found["kl"]) == ("10", 0.5, 0.5, 0.0)


# RAHF's table


def cell(marks: str, negative: str = "", **fields: float) -> dict[str, Any]:
    figures = {"accuracy": 0.7, "kl": 0.1, "perplexity": 2.0, **fields}
    conditions = {"+1": {"marks": marks, **figures}, **({"-1": {"marks": negative}} if negative else {})}
    return {"conditions": conditions, "seconds": 10, "peak_bytes": 2e6, "stored_bytes": 3e3, **fields}


def test_marks_stand_by_prompt() -> None:
    assert marks_of([cell("0011"), cell("0111")], "+1").tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_seeds_that_answer_alike_do_not_narrow_an_interval() -> None:
    marks = "01" * 32
    assert share([cell(marks)]) == share([cell(marks)] * 3) == "0.50 (0.38–0.62)"  # ± 1.96 · √(¼ ÷ 64)


def test_a_rows_summary() -> None:
    own = [cell("0011", "0001", kl=0.1), cell("0111", "0011", kl=0.2)]
    assert summary(own) == ["0.62", "0.38", "0.70", "0.150", "2.00", "10", "2", "3.0"]


# Quantisation


def test_what_quantisation_costs() -> None:
    """Two positions. Unsteered, one differs by KL ½ ln(4 ÷ 3) and has another first token; steered, none."""
    plain = {0.0: (logs([0.25, 0.75], [0.9, 0.1]), 2.0), 1.0: (logs([0.5, 0.5], [0.9, 0.1]), 3.0)}
    quantised = {0.0: (logs([0.5, 0.5], [0.9, 0.1]), 2.5), 1.0: (logs([0.5, 0.5], [0.9, 0.1]), 3.5)}
    found, half = compared(quantised, plain), math.log(4 / 3) / 4
    assert found["positions"] == 2
    assert found["at 0"] == {"kl": pytest.approx(half, rel=1e-5), "same_first": 0.5, "perplexity": 2.5}
    assert found["at 1"] == {"kl": pytest.approx(0, abs=1e-7), "same_first": 1.0, "perplexity": 3.5}
    assert found["steering_kl"] == pytest.approx(0, abs=1e-7)
    assert compared(plain, plain)["steering_kl"] == pytest.approx(half, rel=1e-5)


def test_agreement_is_of_tokens_after_the_same_ids_and_of_whole_texts() -> None:
    ours = [[1, 2, 3, 4], [5, 6, 7, 8]]
    after = [[1, 2, 3, 9], [5, 6, 7, 8]]
    own = [[1, 2, 9, 9], [5, 6, 7, 8]]
    assert agreement(ours, after, own) == Agreement(8, teacher_forced=7 / 8, free_running=6 / 8, same_texts=0.5)


# Data of known quality


def test_the_data_sets_are_what_their_names_say() -> None:
    sets = list(bad_pairs.data_sets(480))
    assert len({one.name for one in sets}) == len(sets) == 97
    assert list(bad_pairs.data_sets(480)) == sets
    for one in sets:
        assert len(one.positives) == len(one.negatives)
        keys = [*one.positives, *one.negatives]
        assert len(set(keys)) == len(keys)
        if "random" not in one.kind:
            swapped = [side for _, _, side in one.positives].count(1)
            assert swapped == [side for _, _, side in one.negatives].count(0) == round(one.flipped * len(one.positives))
        if one.paired and "random" not in one.kind:
            assert all(a[:2] == b[:2] for a, b in zip(one.positives, one.negatives, strict=True))
        by_length = [manner for manner, _, _ in one.positives].count("concise") if one.manner != "concise" else 0
        assert by_length == (int(one.kind[0]) * 96 if "length" in one.kind else 0)


def judged_cell(manner: str, kind: str, figure: float, share: float, flipped: float = 0.0) -> bad_pairs.Cell:
    data = bad_pairs.DataSet(manner, kind, (), (), flipped)
    return bad_pairs.Cell(data, {"significance": figure}, {"share": share, "margin": 10 * share})


def test_effects_are_compared_with_clean_rows_and_ranked() -> None:
    shares = {"warm": (0.5, 0.25, 0.0), "honest": (0.2, 0.1, -0.1)}
    figures = {"warm": (9.0, 2.0, -1.0), "honest": (8.0, 3.0, 0.0)}
    made = [
        judged_cell(manner, "all", figure, share, flipped)
        for manner in shares
        for figure, share, flipped in zip(figures[manner], shares[manner], (0.0, 0.4, 0.5), strict=True)
    ]
    cells = bad_pairs.with_effect(made)
    assert [one.effects["effect"] for one in cells] == pytest.approx([1, 0.5, 0, 1, 0.5, -0.5])
    assert [one.rings for one in cells] == [False, True, True, False, False, True]
    assert bad_pairs.within(cells, "significance", "effect", lambda one: one.data.manner) == pytest.approx(1.0)
    assert 0.8 < bad_pairs.overall(cells, "significance", "effect") < 1
    assert math.isnan(bad_pairs.rank_correlation([(1.0, 2.0), (1.0, 3.0)]))
