"""Decoding over static buffers equals the batched runner, and a step reads only buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.runtime.static_decoding import Replay, StaticRunner, bucket, run_as_it_is
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.running import attached_bank, mixture, plan, prompts, random_profile, reference_ids, request, run_all
from tests.support.tiny import REQUIRED, tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

SLOTS, CONTEXT = 6, 200
# masks of every kind (sliding, ALiBi, sinks, chunked), learned positions, latent attention, experts
ARCHITECTURES = (*REQUIRED, "bloom", "gpt_oss", "gemma2", "llama4_text", "deepseek_v3")


def tiny(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer(), name=architecture)


class Decoding:
    """Rows in some slots of a runner, which advance by a token per step. The test chooses the tokens, so that runners
    are compared on equal inputs."""

    def __init__(self, runner: BatchedRunner, rows: dict[int, list[int]]) -> None:
        self.runner, self.rows = runner, rows
        self.done = dict.fromkeys(rows, 0)
        for slot, ids in rows.items():
            runner.forward([RowInput(slot, ids, 0)])
            self.done[slot] = len(ids)

    def step(self, tokens: dict[int, int], steered: set[int]) -> torch.Tensor:
        """Logits of the running rows, in the order of their slots."""
        works = [
            RowInput(slot, [token], self.done[slot], 0 if slot in steered else None)
            for slot, token in sorted(tokens.items())
        ]
        for slot in tokens:
            self.done[slot] += 1
        return self.runner.forward(works).logits.clone()


def steer(bank: AcceleratedBank, language_model: LanguageModel, strengths: dict[int, float]) -> None:
    """Steer each named row with its own profile; the others are unsteered."""
    for row in range(SLOTS):
        if strength := strengths.get(row):
            bank.write(row, mixture(random_profile(language_model, f"p{row}", seed=row, scale=2.0), strength))
        else:
            bank.clear(row)


# slots and strengths per step: rows join and leave, strengths change, no row is steered, all are
TIMELINE: list[tuple[tuple[int, ...], dict[int, float]]] = [
    ((0, 1, 3), {0: 1.0, 3: -0.5}),
    ((0, 1, 3), {0: 0.25, 3: -0.5}),
    ((0, 1, 3, 4), {}),
    ((1, 3, 4), {1: 1.0, 3: 0.5, 4: -1.0}),
    ((0,), {0: 2.0}),
    ((1, 4), {4: 1.0}),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_the_batched_runner(architecture: str) -> None:
    language_model = tiny(architecture)
    rows = dict(zip((0, 1, 3, 4), prompts(language_model, [140, 3, 30, 125]), strict=True))
    with attached_bank(language_model, SLOTS) as bank:
        runners = [kind(language_model, bank, context=CONTEXT) for kind in (BatchedRunner, StaticRunner)]
        ordinary, static = (Decoding(runner, rows) for runner in runners)
        for number, (slots, strengths) in enumerate(TIMELINE):
            steer(bank, language_model, strengths)
            tokens = {slot: (7 * number + 11 * slot) % language_model.vocab_size for slot in slots}
            expected = ordinary.step(tokens, set(strengths))
            found = static.step(tokens, set(strengths))
            assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4), f"step {number}"
        assert len(runners[1]._replays) > 2, "no step was static"
        for runner in runners:
            runner.close()


def replayed(step: Callable[[], None]) -> Replay:
    """Record a step's tensor operations, as a CUDA graph records kernels, and run only these at every replay. Python
    branches are fixed at recording, and reading a tensor's value fails."""
    step()
    recorded = make_fx(step, tracing_mode="real")()
    return lambda: recorded()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_recorded_step_follows_what_is_written_to_buffers(architecture: str) -> None:
    """Strengths change, rows start and stop being steered, join and leave, without a new recording."""
    language_model = tiny(architecture)
    rows = dict(zip((0, 1, 3, 4), prompts(language_model, [14, 3, 30, 12]), strict=True))
    with attached_bank(language_model, SLOTS) as bank:
        runners = [
            BatchedRunner(language_model, bank, context=CONTEXT),
            StaticRunner(language_model, bank, context=CONTEXT, record=replayed),
        ]
        ordinary, static = (Decoding(runner, rows) for runner in runners)
        unsteered: list[tuple[tuple[int, ...], dict[int, float]]] = [((0, 1, 3, 4), {})]
        for number, (slots, strengths) in enumerate(unsteered + TIMELINE):
            steer(bank, language_model, strengths)
            tokens = {slot: (5 * number + 3 * slot) % language_model.vocab_size for slot in slots}
            expected = ordinary.step(tokens, set(strengths))
            assert torch.allclose(static.step(tokens, set(strengths)), expected, atol=2e-5, rtol=1e-4), number
        assert sorted(runners[1]._replays) == [(1, 128), (4, 128), (6, 128)]
        for runner in runners:
            runner.close()


def test_a_write_between_two_runs_of_a_step_takes_effect() -> None:
    """A write of equal values leaves the logits equal, bit for bit."""
    language_model = tiny("llama")
    profile = random_profile(language_model, scale=2.0)
    with attached_bank(language_model, SLOTS) as bank:
        runner = StaticRunner(language_model, bank, context=CONTEXT, record=replayed)
        runner.forward([RowInput(0, prompts(language_model, [9])[0], 0)])

        def logits(mix: Mixture) -> torch.Tensor:
            bank.write(0, mix)
            return runner.forward([RowInput(0, [5], 9, 0)]).logits.clone()

        plain, steered, half, again = (logits(mixture(profile, strength)) for strength in (0.0, 1.0, 0.5, 1.0))
        assert torch.equal(steered, again)
        assert not torch.allclose(plain, steered)
        assert not torch.allclose(half, steered)
        assert len(runner._replays) == 1
        runner.close()


def test_other_operators_take_the_ordinary_path() -> None:
    """Ablations, preserved norms, residuals that are read, and unsteered prompt positions."""
    language_model = tiny("llama")
    ablating = random_profile(language_model, operator="ablate")
    adding = random_profile(language_model, scale=2.0)
    with attached_bank(language_model, SLOTS) as bank:
        runners = [kind(language_model, bank, context=CONTEXT) for kind in (BatchedRunner, StaticRunner)]
        rows = dict(enumerate(prompts(language_model, [9, 4])))
        pair = [Decoding(runner, rows) for runner in runners]
        for mix in (mixture(ablating), mixture(adding, preserve_norm=True)):
            bank.write(0, mix)
            with pytest.raises(RuntimeError, match="ablates or keeps norms"), bank.step(slice(0, 1), always=True):
                pass
            assert torch.equal(*(one.step({0: 3, 1: 4}, {0}) for one in pair))
        bank.write(0, mixture(adding))
        assert torch.equal(*(runner.forward([RowInput(0, [3], 9, 20)]).logits for runner in runners))
        read = [runner.forward([RowInput(0, [3], 9, 0)], read=[1]).residuals for runner in runners]
        assert torch.equal(*(residuals[0][1] for residuals in read))
        assert runners[1]._replays == {}
        for runner in runners:
            runner.close()


def test_an_engine_over_static_buffers_writes_what_generate_writes() -> None:
    """Unsteered rows equal transformers, steered ones the ordinary engine, with more requests than slots."""
    language_model = tiny("llama")
    rows = prompts(language_model, [11, 3, 30, 19])
    profile = random_profile(language_model, scale=2.0)
    plain = [request(ids, max_tokens=24, ignore_eos=True) for ids in rows]
    steered = [request(ids, plan(profile, (-1.0) ** i), max_tokens=30) for i, ids in enumerate(rows)]
    options = {"slots": 5, "context": 96, "prefill_chunk": 16}
    found = run_all(language_model, [*plain, *steered], cuda_graphs=True, **options)
    assert [one.ids for one in found[:4]] == [reference_ids(language_model, ids, 24) for ids in rows]
    expected = run_all(language_model, steered, **options)
    assert [one.ids for one in found[4:]] == [one.ids for one in expected]


def test_a_step_that_cannot_be_recorded_later_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """For example for lack of memory. If the first recording fails, the choice of the runner fails."""
    language_model = tiny("llama")
    allowed = 0

    def scarce(step: Callable[[], None]) -> Replay:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise torch.OutOfMemoryError("out of memory")
        return run_as_it_is(step)

    with attached_bank(language_model, SLOTS) as bank:
        runner = StaticRunner(language_model, bank, context=CONTEXT, record=scarce)
        with pytest.raises(torch.OutOfMemoryError):
            runner.forward([RowInput(0, [5], 0)])
        allowed = 1
        first = runner.forward([RowInput(0, [5], 0)]).logits.clone()
        with caplog.at_level(logging.WARNING):
            second = runner.forward([RowInput(0, [5], 0), RowInput(1, [5], 0)]).logits
        assert "a step of 2 rows and 128 columns is not recorded: out of memory" in caplog.text
        assert torch.allclose(second, first.expand(2, -1), atol=1e-5)
        runner.close()


def test_static_buffers_where_they_cannot_be_used_are_an_error() -> None:
    language_model = tiny("mamba")
    with attached_bank(language_model, SLOTS) as bank, pytest.raises(ModelError, match="leave cuda_graphs out"):
        choose_runner(language_model, bank, context=64, static=True)


def test_buckets() -> None:
    assert [bucket(count, 1, 20) for count in (1, 2, 3, 9, 16, 17, 20)] == [1, 2, 4, 16, 16, 20, 20]
    assert [bucket(count, 128, 1000) for count in (1, 128, 129, 600)] == [128, 128, 256, 1000]
