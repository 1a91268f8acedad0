"""The seven invariants of the engine, with a test for each number."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from server.engines.protocol import Delta, Finished, GenerationRequest, SteeringPlan
from server.engines.torch.scheduling.prefix_reuse import PrefixKey
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.running import (
    Outcome,
    mixture,
    outcome,
    plan,
    prompts,
    random_profile,
    request,
    run_all,
    running,
    steps,
    submit,
    term,
)
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import byte_fallback_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.slow

ARCHITECTURES = ["llama", "mistral", "gpt2", "falcon_alibi", "gpt_oss", "jamba"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap_model(tiny_model(request.param), tiny_tokenizer(), name=request.param)


def bank_for(language_model: LanguageModel, rows: int = 4) -> AcceleratedBank:
    return AcceleratedBank.over(language_model, rows=rows)


def engine_step(language_model: LanguageModel, bank: AcceleratedBank) -> torch.Tensor:
    """Logits of a prefill step and a decode step with two rows, as the engine runs them."""
    runner = choose_runner(language_model, bank, context=64)
    first, second = prompts(language_model, [9, 5])
    with torch.inference_mode():
        prefill = runner.forward([RowInput(0, first, 0, 8), RowInput(1, second, 0, 4)]).logits
        decode = runner.forward([RowInput(0, [7], 9, 8), RowInput(1, [11], 5, 4)]).logits
    runner.close()
    return torch.cat([prefill, decode])


def test_invariant_1_strength_zero_is_bitwise_the_same_step_without_hooks(language_model: LanguageModel) -> None:
    bank = bank_for(language_model)
    bare = engine_step(language_model, bank)
    bank.attach()
    try:
        idle = engine_step(language_model, bank)
        bank.write(0, mixture(random_profile(language_model), 0.0))
        zero = engine_step(language_model, bank)
        bank.write(1, mixture(random_profile(language_model, scale=5), 1.0))
        neighbour = engine_step(language_model, bank)
    finally:
        bank.detach()
    assert torch.equal(bare, idle)
    assert torch.equal(bare, zero)
    assert torch.equal(bare[[0, 2]], neighbour[[0, 2]])
    assert not torch.equal(bare[[1, 3]], neighbour[[1, 3]])


def test_invariant_2_hidden_state_is_shifted_at_exactly_the_steered_positions() -> None:
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    profile = random_profile(language_model, layers=[1], unit=0.5, scale=3.0)
    bank = bank_for(language_model)
    runner = BatchedRunner(language_model, bank, context=64)
    (ids,) = prompts(language_model, [9])
    layers = range(language_model.num_layers)
    bank.attach()
    try:
        with torch.inference_mode(), record(language_model.blocks, layers) as seen:
            runner.forward([RowInput(0, ids, 0, 8)])
            before = {layer: hidden.clone() for layer, hidden in seen.items()}
            bank.write(0, mixture(profile, -1.5))
            runner.forward([RowInput(0, ids, 0, 8)])
    finally:
        bank.detach()
        runner.close()
    expected = before[1].clone()
    expected[0, 8] += -1.5 * 0.5 * profile.directions[1]
    assert torch.equal(seen[0], before[0])
    assert torch.equal(seen[1], expected)
    assert torch.equal(seen[2][:, :8], before[2][:, :8])
    assert not torch.equal(seen[2][:, 8], before[2][:, 8])


def test_invariant_3_greedy_tokens_do_not_depend_on_neighbours_or_chunks(language_model: LanguageModel) -> None:
    lengths = [17, 3, 30, 9, 21, 5, 40, 12, 8, 26, 2, 33, 14, 6, 19, 11]
    steerings = [
        plan(random_profile(language_model, seed=i, scale=1.0), (-1.0) ** i, apply_to=("generated", "all")[i // 8])
        if i % 3
        else SteeringPlan()
        for i in range(16)
    ]
    rows = [
        (ids, steering, 4 + 2 * i)
        for i, (ids, steering) in enumerate(zip(prompts(language_model, lengths), steerings, strict=True))
    ]

    def requests() -> list:
        return [request(ids, steering, max_tokens=n, ignore_eos=True) for ids, steering, n in rows]

    alone = [run_all(language_model, [one], slots=1, context=96, prefill_chunk=1000)[0].ids for one in requests()[:6]]
    together = [one.ids for one in run_all(language_model, requests(), slots=16, context=96)]
    queued = [one.ids for one in run_all(language_model, requests(), slots=5, context=96, prefill_chunk=7)]
    assert together[:6] == alone
    assert queued == together
    assert [len(ids) for ids in together] == [n for _, _, n in rows]


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("cut", [0, 1, 3])  # bytes of the last character that the completion must add
def test_invariant_4_joined_stream_equals_the_text(make: Callable[[], PreTrainedTokenizerBase], cut: int) -> None:
    tokenizer = make()
    language_model = wrap_model(tiny_model("llama"), tokenizer)
    ids = tokenizer("naïve 日本語 🙂", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "naïve 日本語 🙂"
    emoji, prompt = ids[-4:], ids[: len(ids) - cut]
    often = dict.fromkeys(emoji, 4.0)  # many incomplete characters, and some complete ones
    draws = {"temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
    outcomes = run_all(language_model, [request(prompt, **draws, logit_bias=often, seed=seed) for seed in range(16)])
    forced = [request(prompt, max_tokens=1, logit_bias={token: 100.0}) for token in ids[len(prompt) :][:1]]
    before = decoded(tokenizer, prompt)
    for one in [*outcomes, *run_all(language_model, forced)]:
        whole = decoded(tokenizer, [*prompt, *one.ids])
        kept = next((place for place, pair in enumerate(zip(before, whole, strict=False)) if len(set(pair)) > 1), None)
        assert one.text == whole[len(before) if kept is None else kept :]
    for one in outcomes:
        assert len(one.ids) == 40
        assert sum(map(bool, one.deltas)) > 4  # streamed, not sent at the end
    assert len({one.text for one in outcomes}) == 16
    assert any("\ufffd" in one.text for one in outcomes)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_invariant_5_kv_that_is_read_equals_a_run_from_scratch() -> None:
    language_model = wrap_model(tiny_model("mistral"), tiny_tokenizer())
    lengths, steerings = [20, 7, 13], []
    for seed, apply_to in enumerate(("generated", "all", "generated")):
        steerings.append((random_profile(language_model, seed=seed, scale=2.0), apply_to))
    rows = list(zip(prompts(language_model, lengths), steerings, strict=True))

    async def main() -> list[tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]]:
        async with running(language_model, slots=3, context=64, prefill_chunk=6) as engine:
            requests = [
                request(ids, plan(profile, apply_to=apply_to), max_tokens=15, ignore_eos=True)
                for ids, (profile, apply_to) in rows
            ]
            ends = await asyncio.gather(*(outcome(engine, one) for one in requests))
            layers = engine._runner.cache.layers
            return [
                ([*ids, *end.ids][:-1], [(layer.keys[slot].clone(), layer.values[slot].clone()) for layer in layers])
                for slot, ((ids, _), end) in enumerate(zip(rows, ends, strict=True))
            ]

    held = asyncio.run(main())
    bank = bank_for(language_model, rows=1)
    bank.attach()
    try:
        for (ids, layers), (prompt, (profile, apply_to)) in zip(held, rows, strict=True):
            bank.write(0, mixture(profile, apply_to=apply_to))
            first = 0 if apply_to == "all" else len(prompt) - 1
            scratch = BatchedRunner(language_model, bank, context=64)
            with torch.inference_mode():
                scratch.forward([RowInput(0, ids, 0, first)])
            for (keys, values), layer in zip(layers, scratch.cache.layers, strict=True):
                torch.testing.assert_close(keys[:, : len(ids)], layer.keys[0, :, : len(ids)], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(values[:, : len(ids)], layer.values[0, :, : len(ids)], rtol=1e-4, atol=1e-5)
            scratch.close()
    finally:
        bank.detach()


@pytest.mark.parametrize("seed", range(4))
def test_invariant_5_holds_for_keys_that_other_requests_made(seed: int) -> None:
    """Prompts share prefixes, at the same time or in turn, with every kind of steering and with changes while they run.
    Tokens equal those without reuse, and all cached keys equal those of a run from scratch with the same steering."""
    language_model = wrap_model(tiny_model(("llama", "mistral", "gpt2", "gpt_oss")[seed]), tiny_tokenizer())
    profiles = [random_profile(language_model, f"p{number}", seed=number, scale=2.0) for number in range(2)]
    known = {
        mix.digest(): mix
        for strengths in product((0.0, 1.0), repeat=2)
        if (mix := Mixture(tuple(map(Term, profiles, strengths))))
    }
    draw = random.Random(seed)
    (stem,) = prompts(language_model, [40], seed=seed)

    def steered() -> SteeringPlan:
        terms = [term(one, steps((0, draw.choice((0.0, 1.0))), (draw.randrange(1, 9), 1.0))) for one in profiles]
        return SteeringPlan(tuple(terms), apply_to=draw.choice(("generated", "all")))

    rounds = []
    for _ in range(4):
        texts = [[*stem[: draw.randrange(1, 40)], *prompts(language_model, [draw.randrange(1, 9)])[0]] for _ in "12345"]
        rounds.append([(ids, draw.choice((SteeringPlan(), steered()))) for ids in texts])

    def requests(rows: list[tuple[list[int], SteeringPlan]]) -> list[GenerationRequest]:
        return [request(ids, plan, max_tokens=12, ignore_eos=True) for ids, plan in rows]

    ends, held = asyncio.run(rounds_of(language_model, list(map(requests, rounds)), prefix_reuse=True))
    plain, _ = asyncio.run(rounds_of(language_model, list(map(requests, rounds)), prefix_reuse=False))
    assert [(one.ids, one.end.steered_tokens) for one in ends] == [(one.ids, one.end.steered_tokens) for one in plain]
    assert sum(one.end.cached_tokens for one in ends) > 100
    assert not any(one.end.cached_tokens for one in plain)
    check_held(language_model, held, known)


Held = tuple[PrefixKey, list[tuple[torch.Tensor, torch.Tensor]]]


async def rounds_of(
    language_model: LanguageModel, rounds: list[list[GenerationRequest]], **options: bool
) -> tuple[list[Outcome], list[Held]]:
    """The outcomes of requests, which run together within a round, and the final content of four slots."""
    async with running(language_model, slots=4, context=80, prefill_chunk=16, **options) as engine:
        ends = [end for batch in rounds for end in await asyncio.gather(*(outcome(engine, one) for one in batch))]
        layers = engine._runner.cache.layers
        return ends, [
            (engine._prefixes.key(slot), [(layer.keys[slot].clone(), layer.values[slot].clone()) for layer in layers])
            for slot in range(4)
        ]


def check_held(language_model: LanguageModel, held: list[Held], known: dict[str, Mixture]) -> None:
    """Compare each slot's keys and values with a run of its tokens, one steering span after the other."""
    bank = bank_for(language_model, rows=1)
    bank.attach()
    try:
        for trace, layers in held:
            scratch = BatchedRunner(language_model, bank, context=80)
            ends = [start for start, _ in trace.spans[1:]] + [len(trace)]
            with torch.inference_mode():
                for (start, digest), end in zip(trace.spans, ends, strict=True):
                    bank.write(0, known[digest])
                    scratch.forward([RowInput(0, trace.ids[start:end], start, start if digest else None)])
            for (keys, values), layer in zip(layers, scratch.cache.layers, strict=True):
                for mine, theirs in ((keys, layer.keys[0]), (values, layer.values[0])):
                    torch.testing.assert_close(mine[:, : len(trace)], theirs[:, : len(trace)], rtol=1e-4, atol=1e-5)
            scratch.close()
    finally:
        bank.detach()


def test_invariant_6_a_running_request_keeps_the_profile_it_started_with() -> None:
    """Files that are replaced or deleted during a stream are tested in test_registry."""
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    old, new = (random_profile(language_model, "p", seed=seed, scale=3.0) for seed in (1, 2))
    (ids,) = prompts(language_model, [6])
    kept, replaced = run_all(
        language_model, [request(ids, plan(p), max_tokens=30, ignore_eos=True) for p in (old, new)]
    )

    async def main() -> tuple[list[int], Finished]:
        async with running(language_model) as engine:
            stream = await submit(engine, request(ids, plan(old), max_tokens=30, ignore_eos=True))
            first = await anext(stream)
            assert isinstance(first, Delta)
            await engine.unload_profile(old.version)
            await engine.load_profile(new)
            other = outcome(engine, request(ids, plan(new), max_tokens=30, ignore_eos=True))
            got = list(first.token_ids)
            async for event in stream:
                if isinstance(event, Finished):
                    assert (await other).ids == replaced.ids
                    return got, event
                got += event.token_ids
        raise AssertionError

    got, end = asyncio.run(main())
    assert tuple(got) == kept.ids != replaced.ids
    assert end.reason == "length"


def test_invariant_7_every_request_ends_in_exactly_one_terminal_event() -> None:
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    language_model.model.get_input_embeddings().weight[9] = float("nan")
    ids = [[token for token in row if token != 9] for row in prompts(language_model, [5] * 6)]
    ids[3].append(9)
    never = {"ignore_eos": True, "logit_bias": {9: -100.0}}

    async def main() -> None:
        async with running(language_model, slots=2, context=64) as engine:
            length = outcome(engine, request(ids[0], max_tokens=5, **never))
            context = outcome(engine, request(ids[1], max_tokens=None, **never))
            first = (await outcome(engine, request(ids[2], max_tokens=1, **never))).ids[0]
            stop = outcome(engine, request(ids[2], max_tokens=9, **never, stop_token_ids=(first,)))
            broken = outcome(engine, request(ids[3], max_tokens=9))
            cancelled = request(ids[4], max_tokens=None, **never)
            waiting = request(ids[5], max_tokens=None, **never)
            pending = [asyncio.create_task(outcome(engine, one)) for one in (cancelled, waiting)]
            while engine.stats().waiting + engine.stats().running < 2 or waiting.ids[0] not in engine._requests:
                await asyncio.sleep(0.001)
            assert await engine.cancel(cancelled.ids[0])
            assert await engine.cancel(waiting.ids[0])
            ends = await asyncio.gather(length, context, stop, broken, *pending)
            reasons = [one.end.reason for one in ends]
            assert reasons == ["length", "length", "stop", "error", "cancelled", "cancelled"]
            assert ends[1].end.prompt_tokens + ends[1].end.completion_tokens == 64
            assert "not finite" in (ends[3].end.error or "")
            assert not await engine.cancel(cancelled.ids[0])
            healthy = await asyncio.gather(*(outcome(engine, request(ids[0], max_tokens=5, **never)) for _ in range(2)))
            assert {one.ids for one in healthy} == {ends[0].ids}
            assert engine.stats().running == engine.stats().waiting == 0
            assert sum(engine.stats().finished.values()) == 9

    asyncio.run(main())
