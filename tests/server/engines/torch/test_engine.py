"""The engine's thread: admission, queueing, cancelling, closing. What it promises is in test_invariants."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.errors import Conflict, Overloaded, Unavailable
from server.engines.protocol import Finished, PlanTerm, SteeringPlan, StrengthSchedule
from server.engines.torch.plans import ResolvedPlan
from server.engines.torch.scheduling.request_state import RequestState
from steering_vectors.errors import ProfileMismatch, RequestError, SteeringError
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.mixture import Mixture
from tests.support.running import (
    HeldEngine,
    JumpingClock,
    outcome,
    outcomes,
    plan,
    prompts,
    random_profile,
    reference_ids,
    request,
    run_all,
    running,
    submit,
    term,
)
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

LONG = {"max_tokens": None, "ignore_eos": True}


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def test_refuses_before_it_starts(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [5])
    foreign = random_profile(wrap_model(tiny_model("qwen2"), tiny_tokenizer()))
    huge = random_profile(language_model, unit=3e38)

    async def main() -> None:
        async with running(language_model, context=32) as engine:
            for bad, error, message in (
                (request([]), RequestError, "the prompt is empty"),
                (request([9999]), RequestError, "outside of the vocabulary, 0 to 383"),
                (request([5] * 32), RequestError, "the prompt has 32 tokens; the context holds 32"),
                (request(ids, logit_bias={9999: 1.0}), RequestError, "9999"),
                (request(ids, plan(foreign)), ProfileMismatch, "whose weights differ"),
                (request(ids, plan(huge, 2.0)), SteeringError, "overflows the model's dtype"),
            ):
                with pytest.raises(error, match=message):
                    await submit(engine, bad)
            assert engine.stats().running == engine.stats().waiting == 0

    asyncio.run(main())


def test_a_full_queue_refuses(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [5] * 4)

    async def main() -> None:
        async with running(language_model, slots=1, max_queue=2, context=200) as engine:
            streams = [await submit(engine, request(ids, **LONG)) for ids in rows[:3]]
            with pytest.raises(Overloaded):
                await submit(engine, request(rows[3]))
            for stream in streams:
                await stream.aclose()

    asyncio.run(main())


def test_a_running_choice_ends_when_its_time_is_over(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tokens that it has, with its times and without its neighbour."""
    first, second = prompts(language_model, [5, 6])
    three = run_all(language_model, [request(first, max_tokens=3, ignore_eos=True)])[0].ids
    clock = JumpingClock(monkeypatch)

    async def main() -> None:
        async with running(language_model, slots=2, context=200) as engine:
            late, other = replace(request(first, **LONG), timeout=100.0), request(second, **LONG)
            engine.hold(3, of=late.ids[0])
            waiting = [asyncio.create_task(outcome(engine, one)) for one in (late, other)]
            await asyncio.to_thread(engine.until_held)
            clock.jump(101)
            engine.go()
            ended = await waiting[0]
            assert (ended.end.reason, len(ended.ids), ended.end.completion_tokens) == ("timeout", 3, 3)
            assert ended.end.error == "3 tokens were generated"
            assert ended.end.times is not None
            assert ended.end.times.decode > 0
            assert ended.ids == three
            assert (await waiting[1]).end.reason == "length"

    asyncio.run(main())


def test_a_tenant_is_served_next_however_many_requests_of_another_wait(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [4] * 41)
    many = [replace(request(ids, max_tokens=3, ignore_eos=True), tenant="a") for ids in rows[:40]]
    one = replace(request(rows[40], max_tokens=3, ignore_eos=True), tenant="b")
    order: list[str] = []

    async def main() -> None:
        async with running(language_model, slots=4, context=64) as engine:
            admit = engine._scheduler.admit

            def noted() -> list[RequestState]:
                admitted = admit()
                order.extend(state.id for state in admitted)
                return admitted

            engine._scheduler.admit = noted  # type: ignore[method-assign]
            engine.hold(after=1)
            waiting = [asyncio.create_task(outcomes(engine, *many))]
            await asyncio.to_thread(engine.until_held)
            waiting.append(asyncio.create_task(outcomes(engine, one)))
            while engine._requests.get(one.ids[0]) is None:
                await asyncio.sleep(0.001)
            engine.go()
            ended = await asyncio.gather(*waiting)
            assert {found.end.reason for group in ended for found in group} == {"length"}

    asyncio.run(main())
    assert order.index(one.ids[0]) <= 4 + 4  # in the round after those that ran when it came
    assert [name for name in order if name != one.ids[0]] == [single.ids[0] for single in many]


def test_an_id_is_used_once_at_a_time(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [5])

    async def main() -> None:
        async with running(language_model) as engine:
            one = request(ids, **LONG)
            stream = await submit(engine, one)
            with pytest.raises(Conflict):
                await submit(engine, one)
            await stream.aclose()

    asyncio.run(main())


def test_more_requests_than_slots_all_end(language_model: LanguageModel) -> None:
    outcomes = run_all(language_model, [request(ids) for ids in prompts(language_model, [4] * 20)], slots=3)
    assert {one.end.reason for one in outcomes} <= {"stop", "length"}


@pytest.mark.parametrize("way", ["aclose", "drop", "cancel the task"])
def test_leaving_a_stream_frees_its_slot(language_model: LanguageModel, way: str) -> None:
    (ids,) = prompts(language_model, [5])

    async def main() -> None:
        async with running(language_model, slots=1, context=250) as engine:
            stream = await submit(engine, request(ids, **LONG))
            await anext(stream)
            if way == "aclose":
                await stream.aclose()
            elif way == "drop":
                del stream
                gc.collect()
            else:
                task = asyncio.create_task(outcome(engine, request(ids, **LONG)))
                while not engine.stats().waiting:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await stream.aclose()
            assert (await outcome(engine, request(ids, max_tokens=2, ignore_eos=True))).end.reason == "length"
            assert engine.stats().running == 0
            assert engine.stats().finished["cancelled"] == (2 if way == "cancel the task" else 1)

    asyncio.run(main())


def test_closing_ends_what_runs_and_refuses_what_comes(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [5] * 3)

    async def main() -> None:
        async with running(language_model, slots=1, context=250) as engine:
            streams = [await submit(engine, request(ids, **LONG)) for ids in rows]
            await engine.close()
            for stream in streams:
                events = [event async for event in stream]
                assert isinstance(events[-1], Finished)
                assert events[-1].reason == "cancelled"
            with pytest.raises(Unavailable):
                await submit(engine, request(rows[0]))

    asyncio.run(main())


@pytest.mark.parametrize("block", [0, 2])
def test_a_step_that_breaks_ends_its_requests_and_no_others(block: int) -> None:
    """The model itself raises, in the middle of a pass. Those that wait, and those that come, are answered."""
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    rows = prompts(language_model, [20, 20, 20])
    faults, breaking = [RuntimeError("of the model")], threading.Event()

    def break_once(_module: object, _given: object) -> None:
        if breaking.is_set() and faults:
            raise faults.pop()

    async def main() -> None:
        async with running(language_model, slots=2, context=64) as engine:
            hook = language_model.blocks[block].register_forward_pre_hook(break_once)
            engine.hold(after=2)
            wanted = [request(ids, max_tokens=8, ignore_eos=True) for ids in rows]
            pending = [asyncio.create_task(outcome(engine, one)) for one in wanted]
            await asyncio.to_thread(engine.until_held)
            breaking.set()
            engine.go()
            ends = await asyncio.gather(*pending)
            assert [one.end.reason for one in ends] == ["error", "error", "length"]
            assert [one.end.error for one in ends] == ["RuntimeError while computing a step"] * 2 + [None]
            assert not faults
            again = [rows[place] for place in (2, 0, 1)]
            later = [await outcome(engine, request(ids, max_tokens=8, ignore_eos=True)) for ids in again]
            for one, ids in zip([ends[2], *later], [rows[2], *again], strict=True):
                assert one.ids == reference_ids(language_model, ids, 8)
            assert [one.end.cached_tokens for one in later] == [19, 0, 0]  # nothing builds upon what broke
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.finished) == (0, 0, {"error": 2, "length": 4})
            hook.remove()

    asyncio.run(main())


def test_a_change_whose_asker_has_gone_leaves_the_engine_running(language_model: LanguageModel) -> None:
    """The event loop that asked is closed before the engine's thread comes to it."""
    (ids,) = prompts(language_model, [5])
    engine = HeldEngine(language_model, EngineConfig(slots=1, context=64))

    async def ask(id: str) -> None:
        asking = asyncio.create_task(engine.set_steering(id, SteeringPlan()))
        while engine._commands.empty():
            await asyncio.sleep(0.001)
        assert not asking.done()

    async def main() -> None:
        one = request(ids, max_tokens=8, ignore_eos=True)
        engine.hold()
        stream = await submit(engine, one)
        await asyncio.to_thread(lambda: asyncio.run(ask(one.ids[0])))
        engine.go()
        assert isinstance([event async for event in stream][-1], Finished)
        assert (await outcome(engine, request(ids, max_tokens=2, ignore_eos=True))).end.reason == "length"
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_every_token_is_counted_once(language_model: LanguageModel, prefix_reuse: bool) -> None:
    profile = random_profile(language_model)
    first, second, third = prompts(language_model, [30, 17, 9])
    wanted = [
        request(first, max_tokens=8, ignore_eos=True),
        request([*first, *second], plan(profile), max_tokens=5, ignore_eos=True),
        request(third, plan(profile, apply_to="all"), max_tokens=12, ignore_eos=True),
    ]

    async def main() -> None:
        async with running(language_model, slots=2, context=64, prefill_chunk=7, prefix_reuse=prefix_reuse) as engine:
            ends = [await outcome(engine, one) for one in wanted]
            stats = engine.stats()
        assert stats.cached_tokens == sum(one.end.cached_tokens for one in ends) == (30 if prefix_reuse else 0)
        assert stats.prompt_tokens == sum(len(one.prompt_ids) for one in wanted) - stats.cached_tokens
        assert stats.generated_tokens == sum(len(one.ids) for one in ends) == 8 + 5 + 12
        assert stats.steered_tokens == sum(one.end.steered_tokens for one in ends) == 5 + (9 + 12 - 1)
        assert stats.finished == {"length": 3}

    asyncio.run(main())


@pytest.mark.parametrize(("steps", "cached"), [(1, 0), (2, 79)])
def test_what_a_cancelled_request_leaves_is_kept_once_it_has_written(
    language_model: LanguageModel, steps: int, cached: int
) -> None:
    """Before its first token nothing has shown that the model's logits are finite."""
    (ids,) = prompts(language_model, [80])  # in three steps: four chunks in each, since nothing decodes

    async def main() -> None:
        async with running(language_model, slots=1, context=96, prefill_chunk=8) as engine:
            engine.hold(after=steps)  # and one more, before the engine looks at what came meanwhile
            one = request(ids, max_tokens=9, ignore_eos=True)
            stream = await submit(engine, one)
            await asyncio.to_thread(engine.until_held)
            assert await engine.cancel(one.ids[0])
            engine.go()
            events = [event async for event in stream]
            assert isinstance(events[-1], Finished)
            assert (events[-1].reason, events[-1].completion_tokens) == ("cancelled", min(cached, 1))
            again = await outcome(engine, request(ids, max_tokens=2, ignore_eos=True))
            assert again.end.cached_tokens == cached

    asyncio.run(main())


def test_seeds_reproduce_whatever_the_neighbours(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [7] * 8)

    def sampled(index: int, seed: int):
        return request(rows[index], temperature=1.0, top_p=0.9, seed=seed, max_tokens=20, ignore_eos=True)

    alone = run_all(language_model, [sampled(0, 1)], slots=1)[0].ids
    together = run_all(language_model, [sampled(index, 1) for index in range(8)])
    assert together[0].ids == alone
    assert run_all(language_model, [sampled(0, 2)])[0].ids != alone


def test_stop_strings_end_the_text_before_them(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [7])
    whole = run_all(language_model, [request(ids, max_tokens=40, ignore_eos=True)])[0].text
    stop = whole[5:8]
    stopped = run_all(language_model, [request(ids, max_tokens=40, ignore_eos=True, stop=(stop,))])[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert (stopped.end.reason, stopped.end.matched_stop) == ("stop", stop)


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [("\ufffd", 1, ""), ("\ufffd\ufffd", 2, ""), ("\ufffd\ufffd", 3, ""), ("\ufffdx", 2, "\ufffd\ufffd")],
)
def test_a_stop_string_may_come_with_the_last_token(
    language_model: LanguageModel, stop: str, tokens: int, text: str
) -> None:
    """A character that is never completed is held back up to the end, and becomes text there."""
    begun = language_model.tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    (ids,) = prompts(language_model, [7])
    (one,) = run_all(language_model, [request(ids, max_tokens=tokens, logit_bias={begun: 100.0}, stop=(stop,))])
    assert one.ids == (begun,) * tokens
    assert one.text == text
    assert (one.end.reason, one.end.matched_stop) == (("length", None) if text else ("stop", stop))


def test_a_steering_counts_its_positions(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [10])
    profile = random_profile(language_model)
    generated, everywhere, idle = run_all(
        language_model,
        [
            request(ids, plan(profile), max_tokens=8, ignore_eos=True),
            request(ids, plan(profile, apply_to="all"), max_tokens=8, ignore_eos=True),
            request(ids, plan(profile, 0.0), max_tokens=8, ignore_eos=True),
        ],
    )
    # The last token that is drawn is never fed to the model.
    assert (generated.end.steered_tokens, everywhere.end.steered_tokens, idle.end.steered_tokens) == (8, 17, 0)


def test_its_thread_is_known_by_name(language_model: LanguageModel) -> None:
    async def main() -> None:
        async with running(language_model) as engine:
            await outcome(engine, request(prompts(language_model, [5])[0]))
            names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
            assert "trimtab-engine\n" in names

    asyncio.run(main())


@pytest.mark.slow
def test_a_profile_is_freed_when_the_last_request_lets_go(language_model: LanguageModel) -> None:
    async def main() -> None:
        async with running(language_model, context=250) as engine:
            profile = random_profile(language_model, "passing", seed=9)
            steering = SteeringPlan((PlanTerm("passing", profile.version),))
            freed = weakref.ref(profile)
            await engine.load_profile(profile)
            await engine.unload_profile(profile.version)
            await engine.load_profile(profile)
            stream = await engine.submit([request(prompts(language_model, [5])[0], steering, **LONG)])
            await anext(stream)
            await engine.unload_profile(profile.version)
            del profile
            gc.collect()
            assert freed() is not None
            await stream.aclose()
            while engine.stats().running:
                await asyncio.sleep(0.001)
            await outcome(engine, request([5], max_tokens=1))  # the engine's thread has gone on
            gc.collect()
            assert freed() is None
            assert engine.stats().profiles == 0

    asyncio.run(main())


def test_a_straight_schedule_is_not_computed_ahead(language_model: LanguageModel) -> None:
    """A plan with as many points as may be is checked without a mixture for each of its tokens."""
    profiles = [random_profile(language_model, f"p{place}", seed=place) for place in range(8)]
    line = StrengthSchedule(tuple((64 * place, (place % 2) / 10) for place in range(65)), "linear")
    steering = SteeringPlan(tuple(term(profile, line) for profile in profiles))
    resolved = ResolvedPlan(steering, {profile.version: profile for profile in profiles})
    made = []
    make = resolved._mixture

    def counted(*given: Any, **more: Any) -> Mixture:
        made.append(given)
        return make(*given, **more)

    resolved._mixture = counted  # type: ignore[method-assign]
    resolved.check(torch.float32)
    assert len(made) <= 1 + 2 * len(profiles)


@pytest.mark.parametrize(("strength", "other", "fits"), [(0.5, 1.0, True), (-0.2, 0.05, True), (-0.2, 0.3, False)])
def test_a_mix_keeps_within_the_end_of_the_sign(
    language_model: LanguageModel, strength: float, other: float, fits: bool
) -> None:
    wide = random_profile(language_model, "wide", seed=1, max_strength=4.0)
    uneven = random_profile(language_model, "uneven", seed=2, max_strength=2.0, min_strength=-0.3)
    schedule = StrengthSchedule(((0, 0.0), (4, strength)), "linear")
    steering = SteeringPlan((term(uneven, schedule), term(wide, StrengthSchedule(((0, other),), "linear"))))
    resolved = ResolvedPlan(steering, {wide.version: wide, uneven.version: uneven})
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(SteeringError, match=r"add up to 0\.35, beyond the safe range of 0\.3")
    ):
        resolved.check(torch.float32)


def test_a_mix_keeps_within_the_end_of_the_sign_where_a_strength_crosses_0(language_model: LanguageModel) -> None:
    """At both points the sums are safe: 1.1 of 2 and 0.2 of 0.3. At token 7 they are 0.35 of 0.3."""
    wide = random_profile(language_model, "wide", seed=1, max_strength=4.0)
    uneven = random_profile(language_model, "uneven", seed=2, max_strength=2.0, min_strength=-0.3)
    lines = [StrengthSchedule(points, "linear") for points in (((0, 0.2), (10, -0.1)), ((0, 0.9), (10, 0.1)))]
    steering = SteeringPlan((term(uneven, lines[0]), term(wide, lines[1])))
    with pytest.raises(SteeringError, match=r"add up to 0\.35, beyond the safe range of 0\.3"):
        ResolvedPlan(steering, {wide.version: wide, uneven.version: uneven}).check(torch.float32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Σ|α| is largest within: beside a point at which the other profile does not act yet
        (((0, 1.0), (10, 3.0)), ((0, 1.0), (10, 0.0))),
        (((0, 3.0), (10, 1.0)), ((0, 0.0), (10, 1.0))),
    ],
)
def test_a_mix_of_schedules_keeps_within_the_safe_range_at_every_token(
    language_model: LanguageModel, first: Any, second: Any
) -> None:
    """The limit of a profile counts at each token where it acts."""
    wide = random_profile(language_model, "wide", seed=1, max_strength=4.0)
    narrow = random_profile(language_model, "narrow", seed=2, max_strength=2.0)
    lines = [StrengthSchedule(points, "linear") for points in (first, second)]
    steering = SteeringPlan((term(wide, lines[0]), term(narrow, lines[1])))
    resolved = ResolvedPlan(steering, {wide.version: wide, narrow.version: narrow})
    with pytest.raises(SteeringError, match="add up to"):
        resolved.check(torch.float32)
    ResolvedPlan(replace(steering, allow_beyond_safe=True), {wide.version: wide, narrow.version: narrow}).check(
        torch.float32
    )


def _fail(error: BaseException) -> Any:
    def fail(*_given: object, **_options: object) -> Any:
        raise error

    return fail


async def _held_together(engine: HeldEngine, wanted: list[Any], after: int) -> list[asyncio.Task[Any]]:
    """Requests that run together, held after some steps."""
    engine.hold(after=after)
    pending = [asyncio.create_task(outcome(engine, one)) for one in wanted]
    await asyncio.to_thread(engine.until_held)
    return pending


class Broken:
    """An object some of whose methods raise."""

    def __init__(self, whole: Any, error: BaseException, *names: str) -> None:
        self._whole, self._error, self._names = whole, error, names

    def __getattr__(self, name: str) -> Any:
        return _fail(self._error) if name in self._names else getattr(self._whole, name)


def _break_detokenizer(state: Any) -> None:
    state.detokenizer = Broken(state.detokenizer, RuntimeError("of a tokenizer"), "push", "finish")


def _break_steering(state: Any) -> None:
    panic = type("PanicException", (BaseException,), {})  # as pyo3 names a panic of Rust
    state.steering = Broken(state.steering, panic("of Rust"), "advance")


def _break_bias(state: Any) -> None:
    state.sampler.bias = (np.array([2**40]), np.array([1.0], np.float32))


def _break_draw(state: Any) -> None:
    """After the random numbers of the batch were taken."""
    state.sampler.parameters = Broken(state.sampler.parameters, RuntimeError())
    state.sampler.parameters.top_k = "many"


def _break_details(state: Any) -> None:
    state.projected = (Broken(None, RuntimeError()),)
    state.projected[0].layers = ()


@pytest.mark.parametrize("poison", [_break_detokenizer, _break_steering, _break_bias, _break_draw, _break_details])
def test_an_error_of_one_row_ends_that_row_only(language_model: LanguageModel, poison: Any) -> None:
    rows = prompts(language_model, [9, 12, 15])

    def wanted() -> list[Any]:
        options = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 12, "ignore_eos": True}
        return [request(ids, seed=seed, **options) for seed, ids in enumerate(rows)]

    alone = [run_all(language_model, [one], slots=3)[0].ids for one in wanted()]

    async def main() -> None:
        async with running(language_model, slots=3, context=64) as engine:
            made = wanted()
            pending = await _held_together(engine, made, 4)
            poison(engine._requests[made[1].ids[0]])
            engine.go()
            ends = await asyncio.gather(*pending)
            assert [one.end.reason for one in ends] == ["length", "error", "length"]
            assert made[1].ids[0] in (ends[1].end.error or "")
            assert [ends[0].ids, ends[2].ids] == [alone[0], alone[2]]
            assert (await outcome(engine, wanted()[1])).ids == alone[1]
            assert engine.health() is None

    asyncio.run(main())


def test_a_request_that_cannot_be_given_a_slot_does_not_end_the_engine(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [30, 30])

    async def main() -> None:
        async with running(language_model, slots=1, context=64) as engine:
            evict, faults = engine._prefixes.evict, [RuntimeError("of a copy")]

            def evict_once(*given: Any) -> None:
                if faults:
                    raise faults.pop()
                evict(*given)

            engine._prefixes.evict = evict_once  # type: ignore[method-assign]
            one, other = [await outcome(engine, request(ids, max_tokens=4, ignore_eos=True)) for ids in rows]
            assert (one.end.reason, one.end.error) == ("error", "RuntimeError while computing a step")
            assert other.ids == reference_ids(language_model, rows[1], 4)
            assert engine.stats().running == engine.stats().waiting == 0

    asyncio.run(main())


def test_what_a_failed_step_held_is_not_reused(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [30])

    async def main() -> None:
        async with running(language_model, slots=2, context=64) as engine:
            wanted = [request(ids, max_tokens=4, ignore_eos=True) for _ in range(3)]
            assert [(await outcome(engine, one)).end.cached_tokens for one in wanted[:2]] == [0, 29]
            engine._runner.forward = _fail(MemoryError())  # type: ignore[method-assign]
            broken = await outcome(engine, request(ids, max_tokens=4, ignore_eos=True))
            del engine._runner.forward
            assert broken.end.error == (
                "the server ran out of memory: send shorter or fewer requests, or try again later"
            )
            after = await outcome(engine, wanted[2])
            assert after.end.cached_tokens == 0
            assert after.ids == reference_ids(language_model, ids, 4)

    asyncio.run(main())


@pytest.mark.parametrize("error", [RuntimeError("sticky"), SystemExit("of a library")])
def test_an_engine_that_cannot_go_on_ends_all_and_says_so(error: BaseException) -> None:
    """A step raises, and clearing its slots does too; or the step raises what is no Exception."""
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    rows = prompts(language_model, [5, 6, 7])

    async def main() -> None:
        engine = HeldEngine(language_model, EngineConfig(slots=2, context=64))
        try:
            pending = await _held_together(engine, [request(ids, **LONG) for ids in rows], 2)
            engine._runner.forward = engine._runner.zero_slot = _fail(error)  # type: ignore[method-assign]
            changing = asyncio.create_task(engine.set_steering(next(iter(engine._requests)), SteeringPlan()))
            await asyncio.sleep(0.01)
            engine.go()
            ends = await asyncio.wait_for(asyncio.gather(*pending), 10)
            assert [one.end.reason for one in ends] == ["error"] * 3
            with pytest.raises(RequestError):
                await asyncio.wait_for(changing, 10)
            assert "must be restarted" in (engine.health() or "")
            for work in (submit(engine, request(rows[0])), engine.set_steering("r0", SteeringPlan())):
                with pytest.raises(Unavailable, match="must be restarted"):
                    await asyncio.wait_for(work, 10)
            assert engine.stats().running == engine.stats().waiting == 0
        finally:
            await asyncio.wait_for(engine.close(), 10)

    asyncio.run(main())


def test_a_step_that_hangs_shows_and_does_not_hold_up_the_end(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [5])

    async def main() -> None:
        engine = HeldEngine(language_model, EngineConfig(slots=1, context=64, step_timeout_seconds=0.1))
        assert engine.health() is None
        (pending,) = await _held_together(engine, [request(ids, **LONG)], 2)
        while engine.health() is None:
            await asyncio.sleep(0.01)
        assert engine.health() == "the engine has not finished a step in 0.1 s"
        with pytest.raises(Unavailable, match="does not answer"):
            await engine.set_steering(next(iter(engine._requests)), SteeringPlan())
        await engine.close()
        end = (await pending).end
        assert (end.reason, end.error) == ("error", "the engine does not answer")
        engine.go()
        await asyncio.to_thread(engine._thread.join)
        engine._bank.detach()

    asyncio.run(main())
