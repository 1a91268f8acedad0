"""Methods that instruct or train: planted directions, losses compared with plain references, options, the cache."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.measures.steered_model import steerable
from steering_vectors.methods import Task, method_named, method_names
from steering_vectors.methods.bipo import BaseMargins, bidirectional_loss, middle_block
from steering_vectors.methods.rahf import DualOptions, contrastive_loss, dual_tuned, scit_tuned
from steering_vectors.methods.tuned import TuningOptions, drawn, mean_log_likelihoods, tuned_weights
from steering_vectors.profiles.profile import Profile
from steering_vectors.tuning.paired_reading import Twin, plain_twin
from steering_vectors.tuning.trainable_weights import LoraShape
from steering_vectors.tuning.training import TrainingSchedule
from tests.support.planted import GOOD, OPTIONS, planted_model, planted_task

pytestmark = pytest.mark.slow

TUNED = ("rahf-scit", "rahf-dual")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@cache
def alignments(method: str, **options: Any) -> list[float]:
    """Cosines between a method's directions and the planted ones of eight models, which the method must not change.

    Random directions give 0 ± 0.18 each, and 0 ± 0.06 on average.
    """
    cosines = []
    for seed in range(8):
        lm, axis = planted_model(seed)
        before = {key: value.clone() for key, value in lm.model.state_dict().items()}
        task = planted_task(lm, method)
        found = method_named(method).find(replace(task, options={**task.options, **options}))
        assert list(found) == [1]
        assert found[1].dtype == torch.float32
        cosines.append(float(torch.cosine_similarity(found[1], axis, dim=0)))
        after = lm.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not lm.model.training
    return cosines


@pytest.mark.parametrize("method", [name for name in method_names() if name != "rahf-scit"])
def test_every_method_recovers_a_planted_direction(method: str) -> None:
    """Means are 0.61 to 0.75, the smallest cosine is 0.42."""
    found = alignments(method)
    assert np.mean(found) > 0.5
    assert min(found) > 0.3


def test_scit_recovers_a_part_of_a_planted_direction() -> None:
    """The mean is 0.35. Cosines are 0.1 to 0.6, because the low-rank update need not use the direction."""
    assert np.mean(alignments("rahf-scit")) > 0.2


@pytest.mark.parametrize(("method", "gain"), [("rahf-scit", 0.2), ("rahf-dual", 0.3)])
def test_the_direction_comes_from_the_first_step(method: str, gain: float) -> None:
    """Means are 0 and 0.2 without the first step, and 0.35 and 0.67 with it."""
    untuned = alignments(method, epochs=1e-9, learning_rate=1e-9)
    assert np.mean(alignments(method)) - np.mean(untuned) > gain


def test_scit_tunes_each_side_to_its_own_instruction() -> None:
    """Preferred responses are likely only under p⁺, rejected ones only under p⁻."""
    for seed in range(3):
        lm, _ = planted_model(seed)
        with torch.no_grad(), scit_tuned(planted_task(lm, "rahf-scit")) as first, first.side(0):
            positive, negative = mean_log_likelihoods(lm, first.twins)
        assert first.names == ("scit", "scit")
        assert {lm.tokenizer.decode(twin.response)[0] for twin in first.twins[:12]} == {GOOD}
        for good, own, other in ((True, positive[:12], negative[:12]), (False, negative[12:], positive[12:])):
            assert own.mean() > -0.5, (seed, good)
            assert other.mean() < -1.5, (seed, good)
            assert (own > other).all(), (seed, good)


def test_dual_tunes_a_model_for_each_side() -> None:
    """Both models read p⁺. Each finds only the responses of its own side likely."""
    lm, _ = planted_model()
    with torch.no_grad(), dual_tuned(planted_task(lm, "rahf-dual")) as first:
        sides = []
        for side in (0, 1):
            with first.side(side):
                sides.append(mean_log_likelihoods(lm, first.twins)[0])
    assert (first.names, len(first.twins)) == (("good", "bad"), 24)
    assert (sides[0][:12] > sides[1][:12]).all()
    assert (sides[1][12:] > sides[0][12:]).all()
    assert min(sides[0][:12].mean(), sides[1][12:].mean()) > -0.5


@pytest.mark.parametrize("method", ["contrast-prompts", *TUNED])
@pytest.mark.parametrize("most", [1, 5, 24, 100])
def test_at_most_the_given_number_of_responses_is_read(method: str, most: int) -> None:
    lm, _ = planted_model()
    task, read = planted_task(lm, method), []

    def progress(stage: str, _done: int, total: int, /, detail: str = "") -> None:
        if stage == "contrast":
            read.append(total)

    tuned = {"epochs": 1e-9} if method in TUNED else {}
    method_named(method).find(replace(task, progress=progress, options={**task.options, **tuned, "responses": most}))
    assert set(read) == {min(most, 24)}


@pytest.mark.parametrize("method", TUNED)
def test_the_block_that_is_read_is_the_middle_one(method: str) -> None:
    layers = method_named(method).layers
    assert layers is not None
    assert [layers(count) for count in (1, 2, 3, 8, 32)] == [(0,), (0,), (1,), (3,), (15,)]


def test_the_trace_of_the_instructions_is_subtracted() -> None:
    """The trace is what contrast-prompts finds in the untuned model; baseline=none is the paper's SCIT."""
    lm, _ = planted_model()
    task = planted_task(lm, "rahf-scit")
    task = replace(task, options={**task.options, "epochs": 1.0})
    instructions = {key: task.options[key] for key in ("positive", "negative")}
    untuned = replace(task, options=method_named("contrast-prompts").complete(instructions))
    published = method_named("rahf-scit").find(replace(task, options={**task.options, "baseline": "none"}))
    wanted = published[1] - method_named("contrast-prompts").find(untuned)[1]
    torch.testing.assert_close(method_named("rahf-scit").find(task)[1], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_only_blocks_up_to_the_one_that_is_read_are_tuned(tuning: str) -> None:
    lm, _ = planted_model()
    task = planted_task(lm, "rahf-dual")
    for blocks, changed in (("lower", [True, True, False]), ("all", [True, True, True])):
        options = DualOptions(**{**task.options, "tuning": tuning, "blocks": blocks})
        with tuned_weights(task, options, ["good"], {}) as weights, weights.use("good"):
            inside = {id(p) for p in weights.parameters("good")}
            assert [any(id(p) in inside for p in block.parameters()) for block in lm.blocks[:3]] == changed


def test_full_tuning_finds_it_too() -> None:
    found = alignments("rahf-dual", tuning="full")
    assert np.mean(found) > 0.5
    assert min(found) > 0.3


def watch(task: Task, seen: list[str]) -> Task:
    def progress(stage: str, _done: int, _total: int, /, detail: str = "") -> None:
        seen.append(stage)

    return replace(task, progress=progress)


@pytest.mark.parametrize("method", TUNED)
def test_tuned_weights_are_cached_by_their_inputs(method: str) -> None:
    lm, _ = planted_model()
    task, seen, again, other = planted_task(lm, method), list[str](), list[str](), list[str]()
    task = replace(task, options={**task.options, "epochs": 1.0})
    first = method_named(method).find(watch(task, seen))[1]
    second = method_named(method).find(watch(task, again))[1]
    method_named(method).find(watch(replace(task, seed=1), other))
    assert any(stage.startswith("tune ") for stage in seen)
    assert not any(stage.startswith("tune ") for stage in again)
    assert any(stage.startswith("tune ") for stage in other)
    assert torch.equal(first, second)


def test_scit_equals_its_equation() -> None:
    positive, negative = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -0.5])
    expected = 0.0
    for match, mismatch in ((-1.0, -2.0), (-0.5, -3.0)):
        s = math.exp(match) / (math.exp(match) + math.exp(mismatch))
        expected += (-match - 0.8 * math.log(s) - 0.2 * math.log(1 - s)) / 2
    found = contrastive_loss(positive, negative, torch.tensor([1.0, -1.0]), 0.2)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_bipo_equals_its_equation(sign: int) -> None:
    lm, axis = planted_model()
    task = planted_task(lm, "bipo", rows=4)
    pairs = [
        tuple(Twin(tuple(ids[:start]), tuple(ids[:start]), tuple(ids[start:])) for ids, start in pair)
        for pair in zip(task.positive_ids, task.negative_ids, strict=True)
    ]
    found = bidirectional_loss(lm, 1, 3.0 * axis, pairs, BaseMargins(lm), sign, 0.1)  # type: ignore[arg-type]
    profile = Profile(name="v", model=lm.identity, directions={1: 3.0 * axis}, method="bipo")
    gains = []
    with steerable(lm) as steered:
        for side in (task.positive_ids, task.negative_ids):
            base, _ = steered.log_likelihoods(side, steer=False)
            steered.write(profile, float(sign))
            changed, _ = steered.log_likelihoods(side, steer=True)
            gains.append(changed - base)
    expected = -torch.nn.functional.logsigmoid(sign * 0.1 * (gains[0] - gains[1])).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_bipo_trains_on_both_signs_at_a_falling_rate() -> None:
    """Equals a plain Adam loop on the same loss."""
    lm, _ = planted_model()
    task = planted_task(lm, "bipo", rows=8)
    task = replace(task, options={**task.options, "epochs": 3.0, "batch": 4, "step": 0.02})
    pairs = [
        (plain_twin(*good), plain_twin(*bad)) for good, bad in zip(task.positive_ids, task.negative_ids, strict=True)
    ]
    rate = 0.02 * task.statistics[1].residual_norm / math.sqrt(lm.hidden_size)
    draw, signs = random.Random(task.seed), set()
    vector, mean, square = torch.zeros(3, lm.hidden_size)
    for step in range(6):
        signs.add(sign := draw.choice((-1, 1)))
        moving = vector.clone().requires_grad_()
        bidirectional_loss(lm, 1, moving, drawn(pairs, 4, step, task.seed), BaseMargins(lm), sign, 0.1).backward()
        mean, square = 0.9 * mean + 0.1 * moving.grad, 0.999 * square + 0.001 * moving.grad**2
        step_size = (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        vector = vector - rate * (1 - step / 6) * step_size
    assert signs == {-1, 1}
    torch.testing.assert_close(method_named("bipo").find(task)[1], vector, rtol=1e-4, atol=1e-6)


def test_bipo_lowers_the_loss_of_both_signs() -> None:
    """The loss starts at log 2, without a vector."""
    lm, _ = planted_model()
    task = planted_task(lm, "bipo")
    pairs = [
        (plain_twin(*good), plain_twin(*bad)) for good, bad in zip(task.positive_ids, task.negative_ids, strict=True)
    ]
    vector = method_named("bipo").find(task)[1]
    for sign in (-1, 1):
        assert float(bidirectional_loss(lm, 1, vector, pairs, BaseMargins(lm), sign, 0.1)) < 0.9 * math.log(2)


def test_bipo_needs_pairs() -> None:
    lm, _ = planted_model()
    with pytest.raises(FitError, match="bipo needs pairs"):
        method_named("bipo").find(replace(planted_task(lm, "bipo"), paired=False))


def test_bipo_uses_the_middle_block() -> None:
    assert method_named("bipo").layers is middle_block
    assert [middle_block(count) for count in (1, 8, 32)] == [(0,), (3,), (15,)]


def test_options_are_read_and_checked() -> None:
    method = method_named("rahf-scit")
    assert method.complete({})["smoothing"] == 0.2
    assert method.complete({"epochs": "3", "rank": "8", "goal": "warm"})["epochs"] == 3.0
    assert method_named("mean-diff").complete({}) == {}
    with pytest.raises(FitError, match="rahf-scit has no option 'epoch'; it has goal, positive, negative"):
        method.complete({"epoch": 3})
    with pytest.raises(FitError, match="mean-diff has no option 'epochs'; it has none"):
        method_named("mean-diff").complete({"epochs": 3})
    with pytest.raises(FitError, match="option rank is 'many', which is not of type int"):
        method.complete({"rank": "many"})
    with pytest.raises(FitError, match="option tuning is 'half', not one of lora, full"):
        TuningOptions(tuning="half").schedule(10)
    with pytest.raises(FitError, match="option blocks is 'upper', not one of lower, all"):
        TuningOptions(blocks="upper").schedule(10)
    task = planted_task(planted_model()[0], "rahf-scit")
    with pytest.raises(FitError, match="option baseline is 'tuned', not one of untuned, none"):
        method_named("rahf-scit").find(replace(task, options={**task.options, "baseline": "tuned"}))
    with pytest.raises(FitError, match="option instruction is 'upper', not one of lower, all"):
        method_named("rahf-scit").find(replace(task, options={**task.options, "instruction": "upper"}))
    with pytest.raises(FitError, match="option batch must be positive"):
        TuningOptions(epochs=-1.0).schedule(10)


@pytest.mark.parametrize(("field", "value"), [("beta", 0.0), ("epochs", 0.0), ("step", 0.0), ("batch", 0)])
def test_options_of_bipo_must_be_positive(field: str, value: float) -> None:
    task = planted_task(planted_model()[0], "bipo", rows=2)
    with pytest.raises(FitError) as refusal:
        method_named("bipo").find(replace(task, options={**task.options, field: value}))
    assert refusal.value.message == "options beta, epochs, batch and step must be positive"


def test_bipo_reports_each_step() -> None:
    task, calls = planted_task(planted_model()[0], "bipo", rows=3), list[tuple[str, int, int]]()
    options = {**task.options, "epochs": 0.5, "batch": 1}
    method_named("bipo").find(replace(task, options=options, progress=lambda *call: calls.append(call[:3])))
    assert calls == [("train block 1", 1, 2), ("train block 1", 2, 2)]


def test_bipo_needs_no_prompt() -> None:
    """Without one, all tokens but the first are trained on."""
    lm, _ = planted_model()
    task = planted_task(lm, "bipo", rows=2)
    options = {**task.options, "epochs": 1.0}
    sides = [[(ids, start) for ids, _ in side] for side in (task.positive_ids, task.negative_ids) for start in (0, 1)]
    found = [
        method_named("bipo").find(replace(task, positive_ids=sides[n], negative_ids=sides[n + 2], options=options))[1]
        for n in (0, 1)
    ]
    assert torch.equal(*found)


def test_learning_rates_and_steps() -> None:
    assert TuningOptions(epochs=1.0).schedule(33) == TrainingSchedule(3, 1e-3)
    assert TuningOptions(epochs=1.0, batch=1, tuning="full").schedule(33) == TrainingSchedule(33, 2e-5)
    assert TuningOptions(epochs=1e-9, learning_rate=0.5).schedule(33) == TrainingSchedule(1, 0.5)
    for options in (TuningOptions(batch=0), TuningOptions(epochs=-1.0)):
        with pytest.raises(FitError) as refusal:
            options.schedule(10)
        assert refusal.value.message == "option batch must be positive, and epochs must not be negative"


def test_a_lora_cannot_stand_beside_full_tuning() -> None:
    task = planted_task(planted_model()[0], "rahf-dual")
    options = DualOptions(**{**task.options, "tuning": "full"})
    with (
        pytest.raises(FitError) as refusal,
        tuned_weights(task, options, ["good"], {"x": LoraShape(rank=1, alpha=2, targets="all-linear", last_block=1)}),
    ):
        pass
    assert refusal.value.message == "a LoRA cannot be fitted to a fully tuned model; use option tuning=lora"


def test_samples_are_drawn_from_the_seed_and_the_epoch() -> None:
    expected = []
    for epoch in range(3):
        order = list(range(5))
        random.Random(f"7-{epoch}").shuffle(order)
        expected += order
    assert [one for step in range(5) for one in drawn(list(range(5)), 3, step, 7)] == expected


def test_small_data_is_gone_through_more_often() -> None:
    assert TuningOptions().schedule(100).steps == 75
    assert TuningOptions().schedule(8000).steps == 1000
    assert DualOptions().schedule(8000).steps == 1500
    assert TuningOptions(epochs=1.0).schedule(100).steps == 7


def test_every_epoch_goes_through_all_samples_in_another_order() -> None:
    samples = list(range(10))
    first = [one for step in range(2) for one in drawn(samples, 5, step, 0)]
    second = [one for step in range(2, 4) for one in drawn(samples, 5, step, 0)]
    assert sorted(first) == sorted(second) == samples
    assert first != second
    assert drawn(samples, 5, 1, 0) == drawn(samples, 5, 1, 0)


def test_every_method_with_options_is_planted() -> None:
    """The options with which the first step finds a direction in such a small model."""
    assert set(OPTIONS) == {name for name in method_names() if method_named(name).complete({})}
