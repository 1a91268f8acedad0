"""The benchmark of conversations: the order of questions, what each turn's prompt has, and figures computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from benchmarks.quality.judges import JUDGES, Judge, words
from benchmarks.quality.persistence import Assistant, Turn, assistants, compare, converse, estimate, questions
from steering_vectors.data.chat import Message, decoded_after, encode_prompt
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.gate import Gate
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [f"Ask {n}" for n in range(24)]
PLAN = [["Ask", "soup", "wind"], ["wind", "Ask", "pears"], ["warm water", "wind", "Ask"]]
TOKENS = 8


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture
def judge() -> Judge:
    return replace(JUDGES["concise"], score=words)


@pytest.mark.parametrize(
    ("conversations", "turns", "asked"), [(12, 10, 12), (24, 10, 24), (48, 10, 24), (13, 13, 13), (26, 4, 13)]
)
def test_each_question_is_asked_equally_often_at_every_turn(conversations: int, turns: int, asked: int) -> None:
    plan = questions(PROMPTS, conversations, turns, seed=3)
    assert [len(conversation) for conversation in plan] == [turns] * conversations
    assert all(len(set(conversation)) == turns for conversation in plan)
    first, *others = (Counter(turn) for turn in zip(*plan, strict=True))
    assert sum(first.values()) == conversations
    assert all(turn == first for turn in others)
    for start in range(0, conversations, asked):  # a square
        assert set(Counter(row[0] for row in plan[start : start + asked]).values()) == {1}
    assert plan == questions(PROMPTS, conversations, turns, seed=3)
    assert plan != questions(PROMPTS, conversations, turns, seed=4)


@pytest.mark.parametrize("conversations", [12, 24])
def test_no_question_follows_the_same_one_twice(conversations: int) -> None:
    plan = questions(PROMPTS, conversations, 10, seed=0)
    followed = Counter(pair for conversation in plan for pair in pairwise(conversation))
    assert set(followed.values()) == {1}


@pytest.mark.parametrize(("conversations", "turns"), [(2, 3), (29, 10), (48, 25)])
def test_an_order_that_cannot_be_balanced_is_refused(conversations: int, turns: int) -> None:
    with pytest.raises(typer.BadParameter, match=f"multiple of a number from {turns} .* to 24"):
        questions(PROMPTS, conversations, turns, seed=0)


def replayed(
    steered: SteeredModel, assistant: Assistant, seed: int, *system: Message
) -> list[tuple[list[list[int]], list[str]]]:
    """The replies of each turn, as ids and as texts, after prompts that are written out here."""
    tokenizer, found = steered.lm.tokenizer, []
    messages: list[list[Message]] = [[*system] for _ in PLAN]
    for turn in range(3):
        for row, asked in enumerate(PLAN):
            messages[row].append(Message("user", asked[turn]))
        prompts = [encode_prompt(tokenizer, row) for row in messages]
        steered.write(assistant.steering, assistant.strength)
        replies = steered.sample(prompts, tokens=TOKENS, seed=1000 * seed + turn + 1)
        texts = [decoded_after(tokenizer, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        for row, text in enumerate(texts):
            messages[row].append(Message("assistant", text))
        found.append((replies, texts))
    roles = [message.role for message in messages[0][len(system) :]]
    assert roles == ["user", "assistant"] * 3
    return found


def test_each_reply_is_in_the_next_prompt_of_its_conversation(lm: LanguageModel, judge: Judge) -> None:
    """Figures by turn are those of replies to the whole conversation, steered from the last prompt token on."""
    profile = tiny_profile(lm.identity, layers=(1,), unit=3.0)
    ends = eos_ids(lm)
    with steerable(lm) as steered:
        for assistant in assistants(steered, profile, judge, 1, 1.0, 0)[:-1]:
            turns = list(converse(assistant, judge, PLAN, TOKENS, 5))
            assert [one.turn for one in turns] == [1, 2, 3]
            for one, (replies, texts) in zip(turns, replayed(steered, assistant, 5), strict=True):
                counts = [len(text.split()) for text in texts]
                assert one.condition == assistant.name
                assert one.scores == counts
                assert one.figure == one.words == np.mean(counts)
                assert one.interval == estimate(np.array(counts))[1:]
                assert one.ended == np.mean([reply[-1] in ends for reply in replies])
                assert one.example == " ".join(texts[0].split())


def test_perplexity_is_the_unsteered_model_s_after_the_conversation(lm: LanguageModel, judge: Judge) -> None:
    profile = tiny_profile(lm.identity, layers=(1,), unit=3.0)
    conversations = [[Message("user", "Ask"), Message("assistant", "soup"), Message("user", one)] for one in "abc"]
    prompts = [encode_prompt(lm.tokenizer, conversation) for conversation in conversations]
    with steerable(lm) as steered:
        cast = assistants(steered, profile, judge, 0, 1.0, 0)
        found = [one.reply(conversations, tokens=TOKENS, seed=2) for one in cast]
    for asked, replies, likelihood in found:
        assert asked == prompts
        total = 0.0
        for prompt, reply in zip(prompts, replies, strict=True):
            with torch.no_grad():
                logs = lm.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
            total += sum(float(logs[len(prompt) + step - 1, token]) for step, token in enumerate(reply))
        assert likelihood == pytest.approx(total, rel=1e-4)
    assert found[0][1] != found[1][1]
    turn = next(converse(cast[0], judge, PLAN, TOKENS, 0))
    _, replies, likelihood = cast[0].reply([[Message("user", one[0])] for one in PLAN], tokens=TOKENS, seed=1)
    assert turn.perplexity == math.exp(-likelihood / sum(map(len, replies)))


def test_the_instruction_stands_before_the_conversation(lm: LanguageModel, judge: Judge) -> None:
    profile = tiny_profile(lm.identity, layers=(1,), unit=3.0)
    with steerable(lm) as steered:
        *_, prompted = assistants(steered, profile, judge, 0, 1.0, 0)
        steered.write(profile, 1.0)  # which must not reach its replies
        turns = list(converse(prompted, judge, PLAN, TOKENS, 0))
        expected = replayed(steered, prompted, 0, Message("system", judge.instruction))
        plain = replayed(steered, prompted, 0)
    assert [one.example for one in turns] == [" ".join(texts[0].split()) for _, texts in expected]
    assert [texts for _, texts in expected] != [texts for _, texts in plain]


def test_a_gate_decides_at_every_turn(lm: LanguageModel, judge: Judge) -> None:
    """No prompt opens this gate, so neither the profile nor its controls change a reply."""
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1))
    gated = tiny_profile(lm.identity, layers=(1,), unit=3.0, gate=Gate(0, direction, 2.0, "above"))
    with steerable(lm) as steered:
        plain, *others = (
            [one.example for one in converse(assistant, judge, PLAN, TOKENS, 0)]
            for assistant in assistants(steered, gated, judge, 1, 1.0, 0)[:-1]
        )
    assert others == [plain] * 3


def test_the_conditions(lm: LanguageModel, judge: Judge) -> None:
    profile = tiny_profile(lm.identity, layers=(1,))
    with steerable(lm) as steered:
        cast = assistants(steered, profile, judge, 2, 0.5, 7)
    assert [(one.name, one.steering.name, one.strength, one.instruction) for one in cast] == [
        ("unsteered", "warm", 0.0, ""),
        ("warm at +0.5", "warm", 0.5, ""),
        ("warm at -0.5", "warm", -0.5, ""),
        ("random-0 at +0.5", "random-0", 0.5, ""),
        ("random-1 at +0.5", "random-1", 0.5, ""),
        (f"system prompt: {judge.instruction}", "warm", 0.0, judge.instruction),
    ]
    for one, control in zip(cast[3:5], random_controls(profile, 2, seed=7), strict=True):
        assert torch.equal(one.steering.directions[1], control.directions[1])
        torch.testing.assert_close(control.directions[1].norm(), profile.directions[1].norm())


def test_effects_are_differences_from_the_same_conversation() -> None:
    generator = np.random.default_rng(0)
    scores = {name: generator.normal(size=(6, 4)) for name in ("unsteered", "warm at +1", "warm at -1", "system")}
    scores["warm at +1"] = scores["unsteered"] + 2 - 0.5 * np.arange(4)  # equal in all conversations
    turns = [
        Turn("warm", name, turn + 1, 0.0, (0.0, 0.0), 0.0, 0.0, 1.0, values[:, turn].tolist(), "")
        for name, values in scores.items()
        for turn in range(4)
    ]
    found = {one.condition: one for one in compare(turns)}
    assert list(found) == ["warm at +1", "warm at -1", "warm at +1 against -1", "system"]
    planted = found["warm at +1"]
    assert planted.first == pytest.approx((2, 2, 2))
    assert planted.last == pytest.approx((0.5, 0.5, 0.5))
    assert planted.mean == pytest.approx((1.25, 1.25, 1.25))
    assert planted.slope == pytest.approx((-0.5, -0.5, -0.5))
    for name, one, other in (
        ("system", "system", "unsteered"),
        ("warm at +1 against -1", "warm at +1", "warm at -1"),
    ):
        effect = scores[one] - scores[other]
        slopes = np.polyfit(np.arange(4), effect.T, 1)[0]
        assert found[name].first == estimate(effect[:, 0])
        assert found[name].last == estimate(effect[:, -1])
        assert found[name].mean == estimate(effect.mean(1))
        assert found[name].slope == pytest.approx(estimate(slopes))
        assert found[name].slope[1] < slopes.mean() < found[name].slope[2]


def test_a_conversation_beyond_the_context_is_refused(lm: LanguageModel, judge: Judge) -> None:
    profile = tiny_profile(lm.identity, layers=(1,))
    plan = [["Ask", "soup " * 300], ["wind", "pears"]]
    with steerable(lm) as steered:
        turns = converse(assistants(steered, profile, judge, 0, 1.0, 0)[0], judge, plan, TOKENS, 0)
        assert next(turns).turn == 1
        with pytest.raises(typer.BadParameter, match="context 256: use fewer --turns"):
            next(turns)


def test_shipped_judges_have_enough_questions_for_ten_turns() -> None:
    for name, judge in JUDGES.items():
        if name != "careful":
            assert len(questions(judge.prompts(Path()), 12, 10, 0)) == 12
