"""The engine's thread: admission, queueing, cancelling, closing. What it promises is in test_invariants."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from server.engine.protocol import Finished
from steering_vectors.errors import Conflict, Overloaded, ProfileMismatch, RequestError, SteeringError, Unavailable
from steering_vectors.models import LanguageModel, wrap_model
from tests.running import mixture, outcome, prompts, random_profile, request, run_all, running
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

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
                (request(ids, mixture(foreign)), ProfileMismatch, "whose weights differ"),
                (request(ids, mixture(huge, 2.0)), SteeringError, "overflows the model's dtype"),
            ):
                with pytest.raises(error, match=message):
                    engine.generate(bad)
            assert engine.stats().running == engine.stats().waiting == 0

    asyncio.run(main())


def test_a_full_queue_refuses(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [5] * 4)

    async def main() -> None:
        async with running(language_model, slots=1, max_queue=2, context=200) as engine:
            streams = [engine.generate(request(ids, **LONG)) for ids in rows[:3]]
            with pytest.raises(Overloaded):
                engine.generate(request(rows[3]))
            for stream in streams:
                await stream.aclose()

    asyncio.run(main())


def test_an_id_is_used_once_at_a_time(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [5])

    async def main() -> None:
        async with running(language_model) as engine:
            one = request(ids, **LONG)
            stream = engine.generate(one)
            with pytest.raises(Conflict):
                engine.generate(one)
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
            stream = engine.generate(request(ids, **LONG))
            await anext(stream)
            if way == "aclose":
                await stream.aclose()
            elif way == "drop":
                del stream
                gc.collect()
            else:
                task = asyncio.create_task(outcome(engine, request(ids, **LONG)))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await stream.aclose()
            assert (await outcome(engine, request(ids, max_tokens=2, ignore_eos=True))).end.reason == "length"
            assert engine.stats().running == 0

    asyncio.run(main())


def test_closing_ends_what_runs_and_refuses_what_comes(language_model: LanguageModel) -> None:
    rows = prompts(language_model, [5] * 3)

    async def main() -> None:
        async with running(language_model, slots=1, context=250) as engine:
            streams = [engine.generate(request(ids, **LONG)) for ids in rows]
            await engine.close()
            for stream in streams:
                events = [event async for event in stream]
                assert isinstance(events[-1], Finished)
                assert events[-1].reason == "cancelled"
            with pytest.raises(Unavailable):
                engine.generate(request(rows[0]))

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


def test_a_steering_counts_its_positions(language_model: LanguageModel) -> None:
    (ids,) = prompts(language_model, [10])
    profile = random_profile(language_model)
    generated, everywhere, idle = run_all(
        language_model,
        [
            request(ids, mixture(profile), max_tokens=8, ignore_eos=True),
            request(ids, mixture(profile, apply_to="all"), max_tokens=8, ignore_eos=True),
            request(ids, mixture(profile, 0.0), max_tokens=8, ignore_eos=True),
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
