"""What every engine must do, seen through the protocol alone."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engines.errors import Conflict, Overloaded, Unavailable, UnknownGeneration, UnknownProfile
from server.engines.protocol import (
    ALL_CAPABILITIES,
    Constraint,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    PlanTerm,
    PromptLogprobs,
    SamplingParameters,
    SteeringPlan,
    StrengthSchedule,
)
from steering_vectors.data.chat import decoded_after
from steering_vectors.errors import ProfileMismatch, RequestError, SteeringError
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.profile import Profile
from tests.support.contract import ENGINES, POISON, Served, served, tiny_language_model
from tests.support.running import load, outcome, outcomes, plan, random_profile, request, steps, submit, term, versioned
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPT = (20, 31, 42, 53, 64, 75)
FREE: dict[str, Any] = {"ignore_eos": True, "logit_bias": {POISON: -100.0}}
ENDLESS: dict[str, Any] = {**FREE, "max_tokens": None}


@pytest.fixture(scope="module", params=list(ENGINES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one(kind: str) -> Iterator[Served]:
    with served(kind, slots=4, context=200, max_queue=8, prefill_chunk=8) as found:
        yield found


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return tiny_language_model()


@pytest.fixture(scope="module")
def warm(language_model: LanguageModel) -> Profile:
    return random_profile(language_model, "warm", seed=1, scale=2.0, calibration={"kl_at_1": 0.1})


@pytest.fixture(scope="module")
def cold(language_model: LanguageModel) -> Profile:
    return random_profile(language_model, "cold", seed=2, scale=2.0, layers=[0, 2])


async def collect(one: Served, *requests: GenerationRequest) -> list[Event]:
    return [event async for event in await submit(one.engine, *requests)]


async def idle(one: Served) -> None:
    """Wait until nothing runs or waits."""
    while one.engine.stats().running or one.engine.stats().waiting:
        await asyncio.sleep(0.005)


# What an engine says of itself.


def test_its_description_can_be_sent(one: Served, language_model: LanguageModel) -> None:
    info = pickle.loads(pickle.dumps(one.engine.info))
    assert info.identity == language_model.identity
    assert (info.vocab_size, info.context, info.slots, info.capacity) == (384, 200, 4, 12)
    assert info.capabilities <= ALL_CAPABILITIES
    assert info.tokenizer.decode([40, 41]) == language_model.tokenizer.decode([40, 41])


# Events.


def test_each_choice_has_its_events_in_order_and_one_end(one: Served, language_model: LanguageModel) -> None:
    asked = replace(
        request(PROMPT, temperature=1.5, seed=3, max_tokens=20, **FREE),
        ids=("first", "second", "third"),
        logprobs=2,
        prompt_logprobs=1,
    )
    events = one.run(collect(one, asked))
    for name in asked.ids:
        mine = [event for event in events if event.id == name]
        assert isinstance(mine[0], PromptLogprobs)
        assert len(mine[0].tokens) == len(PROMPT) - 1
        assert isinstance(mine[-1], Finished)
        deltas = [event for event in mine[1:-1] if isinstance(event, Delta)]
        assert len(deltas) == len(mine) - 2
        ids = [token for delta in deltas for token in delta.token_ids]
        assert len(ids) == mine[-1].completion_tokens == 20
        assert "".join(delta.text for delta in deltas) == decoded_after(language_model.tokenizer, PROMPT, ids)
        assert [one.token_id for delta in deltas for one in delta.logprobs] == ids
        assert all(len(one.top) == 2 for delta in deltas for one in delta.logprobs)


def test_every_event_survives_pickle(one: Served, warm: Profile) -> None:
    asked = replace(
        request(PROMPT, plan(warm, steps((0, 0.5), (3, 1.0))), max_tokens=6, **FREE), logprobs=1, divergence=True
    )
    for message in (asked, *one.run(collect(one, asked))):
        assert pickle.loads(pickle.dumps(message)) == message


def test_choices_draw_from_their_seed_and_place(one: Served) -> None:
    wish: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, **FREE}
    alone = one.run(outcome(one.engine, request(PROMPT, seed=5, **wish)))
    asked = replace(request(PROMPT, seed=5, **wish), ids=("a", "b", "c"))
    together = [found.ids for found in one.run(outcomes(one.engine, asked))]
    again = [found.ids for found in one.run(outcomes(one.engine, asked))]
    assert together == again
    assert together[0] == alone.ids
    assert len(set(together)) == 3


# The seven invariants, as far as they show.


def test_invariant_1_strength_zero_is_the_untouched_model(one: Served, warm: Profile) -> None:
    wish: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 12, **FREE}
    asked = (request(PROMPT, **wish), request(PROMPT, plan(warm, 0.0), **wish), request(PROMPT, plan(warm), **wish))
    plain, zero, steered = one.run(outcomes(one.engine, *(replace(single, logprobs=3) for single in asked)))
    assert plain.ids == zero.ids != steered.ids
    assert (zero.end.steered_tokens, steered.end.steered_tokens) == (0, 12)


def log_probs(
    language_model: LanguageModel, ids: Sequence[int], profile: Profile, strength: float, start: int
) -> torch.Tensor:
    """By a plain pass whose blocks are shifted by hand from a position on."""

    def hook_for(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, start:] += strength * profile.unit * profile.directions[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    handles = [language_model.blocks[layer].register_forward_hook(hook_for(layer)) for layer in profile.directions]
    try:
        with torch.no_grad():
            logits = language_model.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
        found: torch.Tensor = logits[0].log_softmax(-1)
        return found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("apply_to", ["generated", "all"])
def test_invariant_2_exactly_the_steered_positions_are_shifted(
    one: Served, language_model: LanguageModel, warm: Profile, apply_to: Any
) -> None:
    """Seen in the log-probabilities of a scored completion, and of the tokens that follow it."""
    whole, suffix = (*PROMPT, 80, 81, 82, 83), 4
    asked = replace(
        request(whole, plan(warm, -0.75, apply_to=apply_to), max_tokens=5, **FREE),
        logprobs=0,
        prompt_logprobs=0,
        scored_suffix=suffix,
    )
    events = one.run(collect(one, asked))
    told = [token for event in events if not isinstance(event, Finished) for token in event_logprobs(event)]
    ids = (*whole, *(token.token_id for token in told[suffix:]))
    start = 0 if apply_to == "all" else len(PROMPT) - 1
    rows = log_probs(language_model, ids, warm, -0.75, start)
    wanted = [float(rows[len(PROMPT) - 1 + place, token.token_id]) for place, token in enumerate(told)]
    assert [token.logprob for token in told] == pytest.approx(wanted, abs=1e-4)


def event_logprobs(event: Any) -> Sequence[Any]:
    return event.tokens if isinstance(event, PromptLogprobs) else event.logprobs


def test_invariant_3_tokens_do_not_depend_on_neighbours(one: Served, warm: Profile, cold: Profile) -> None:
    plans = [SteeringPlan(), plan(warm), plan(cold, -1.0), plan(warm, 0.5, apply_to="all")]
    rows = [
        request(
            PROMPT[: 2 + place % 4] + (90 + place,) * (1 + 2 * place), plans[place % 4], max_tokens=8 + place, **FREE
        )
        for place in range(8)
    ]
    alone = [one.run(outcome(one.engine, row)).ids for row in rows[:4]]
    together = [found.ids for found in one.run(outcomes(one.engine, *rows))]
    assert together[:4] == alone
    assert [len(ids) for ids in together] == [8 + place for place in range(8)]


def test_invariant_5_a_reused_prefix_changes_nothing(one: Served, warm: Profile) -> None:
    stem = tuple(range(100, 140))
    first = one.run(outcome(one.engine, request((*stem, 7), plan(warm), max_tokens=6, **FREE)))
    asked = request((*stem, 7, *first.ids, 8), plan(warm, -1.0), max_tokens=6, **FREE)
    reused = one.run(outcome(one.engine, asked))
    fresh = one.run(outcome(one.engine, replace(asked, ids=("fresh",), prompt_logprobs=0)))  # computed anew
    assert (reused.end.cached_tokens > 0, fresh.end.cached_tokens) == (True, 0)
    assert reused.ids == fresh.ids


def test_a_prefix_is_reused_for_its_tenant_only(one: Served) -> None:
    prompt = tuple(range(200, 240))
    asked = [
        replace(request((*prompt, last), max_tokens=1), tenant=tenant)
        for last, tenant in enumerate(("a", "b", "", "b"))
    ]
    assert [one.run(outcome(one.engine, ask)).end.cached_tokens for ask in asked] == [0, 0, 0, len(prompt)]


def test_invariant_6_a_running_request_keeps_its_version(one: Served, language_model: LanguageModel) -> None:
    old, new = (random_profile(language_model, "p", seed=seed, scale=2.0) for seed in (11, 12))
    by_old, by_new = (SteeringPlan((PlanTerm("p", profile.version),)) for profile in (old, new))

    async def main() -> None:
        engine = one.engine
        await engine.load_profile(old)
        kept = await outcome(engine, request(PROMPT, by_old, max_tokens=60, **FREE))
        stream = await engine.submit([request(PROMPT, by_old, max_tokens=60, **FREE)])
        ids = list((await anext(stream)).token_ids)
        await engine.unload_profile(old.version)
        await engine.load_profile(new)
        replaced = await outcome(engine, request(PROMPT, by_new, max_tokens=60, **FREE))
        async for event in stream:
            ids += event.token_ids if isinstance(event, Delta) else ()
        assert tuple(ids) == kept.ids != replaced.ids
        await engine.unload_profile(new.version)
        for plan_ in (by_old, by_new):
            with pytest.raises(UnknownProfile):
                await engine.explain(plan_)

    one.run(main())


def test_invariant_7_every_request_ends_in_one_terminal_event(one: Served, warm: Profile) -> None:
    async def main() -> list[str]:
        engine = one.engine
        length = request(PROMPT, max_tokens=3, **FREE)
        context = request(PROMPT, **ENDLESS)
        first = (await outcome(engine, request(PROMPT, max_tokens=1, **FREE))).ids[0]
        stop = request(PROMPT, max_tokens=9, stop_token_ids=(first,), **FREE)
        broken = request((*PROMPT, POISON), plan(warm), max_tokens=9)
        cancelled = request((5, 6, 7), **ENDLESS)
        stream = await submit(engine, cancelled)
        await anext(stream)
        assert await engine.cancel(cancelled.ids[0])
        ends = [event async for event in stream if isinstance(event, Finished)]
        found = await outcomes(engine, length, context, stop, broken)
        assert found[1].end.prompt_tokens + found[1].end.completion_tokens == engine.info.context
        assert found[2].end.matched_stop == first
        assert "not finite" in found[3].end.error
        assert found[3].end.error_param == "strength"
        assert not await engine.cancel(cancelled.ids[0])
        return [one.end.reason for one in found] + [end.reason for end in ends]

    assert one.run(main()) == ["length", "length", "stop", "error", "cancelled"]


# Accepting requests.


def test_all_requests_are_accepted_or_none(one: Served) -> None:
    good, bad = request(PROMPT, max_tokens=2), request((*PROMPT, 5000))

    async def main() -> None:
        with pytest.raises(RequestError):
            await one.engine.submit([good, bad])
        await idle(one)
        assert (await outcome(one.engine, good)).end.reason in ("length", "stop")  # its id is free

    one.run(main())


def test_errors_name_fields_of_the_protocol(one: Served, warm: Profile, language_model: LanguageModel) -> None:
    unknown = SteeringPlan((PlanTerm("never", "0" * 64),))
    beyond, many = plan(warm, 9.0), SteeringPlan((term(warm, 1.5), term(random_profile(language_model, "x"), 1.5)))
    cases: list[tuple[GenerationRequest, type[Exception], str | None, str]] = [
        (request(()), RequestError, "prompt_ids", "invalid_request"),
        (request((5000,)), RequestError, "prompt_ids", "invalid_request"),
        (request((5,) * 200), RequestError, "prompt_ids", "context_length_exceeded"),
        (request(PROMPT, logit_bias={5000: 1.0}), RequestError, "logit_bias", "invalid_request"),
        (request(PROMPT, stop_token_ids=(5000,)), RequestError, "stop_token_ids", "invalid_request"),
        (request(PROMPT, stop=("x</s>y",)), RequestError, "stop", "invalid_request"),
        (request(PROMPT, unknown), UnknownProfile, "version", "profile_not_found"),
        (request(PROMPT, beyond), SteeringError, "strength", "strength_out_of_range"),
        (request(PROMPT, many), SteeringError, "terms", "strength_out_of_range"),
        (request(PROMPT, plan(warm, steps((0, 0.0), (9, 9.0)))), SteeringError, "strength", "strength_out_of_range"),
        (request(PROMPT, SteeringPlan((term(warm, layers=(99,)),))), SteeringError, "layers", "invalid_steering"),
        (replace(request(PROMPT), constraint=Constraint("regex", "(")), RequestError, "constraint", "invalid_request"),
        (
            replace(request(PROMPT, ignore_eos=True), constraint=Constraint("regex", "a")),
            RequestError,
            "ignore_eos",
            "invalid_request",
        ),
    ]

    async def main() -> None:
        for bad, error, param, code in cases:
            with pytest.raises(error) as failure:
                await submit(one.engine, bad)
            assert (failure.value.param, failure.value.code) == (param, code), bad  # type: ignore[attr-defined]
            assert not {"--", "guided_", "steering."} & {
                part for part in ("--", "guided_", "steering.") if part in str(failure.value)
            }
        assert one.engine.stats().running == one.engine.stats().waiting == 0

    one.run(main())


def test_ids_are_unique_and_the_queue_is_bounded(one: Served) -> None:
    async def main() -> None:
        engine = one.engine
        running = request(PROMPT, **ENDLESS)
        stream = await submit(engine, running)
        with pytest.raises(Conflict):
            await submit(engine, running)
        many = replace(running, ids=tuple(f"many-{place}" for place in range(engine.info.capacity)))
        with pytest.raises(Overloaded):
            await submit(engine, many)
        await stream.aclose()

    one.run(main())
    one.run(idle(one))


def test_a_choice_ends_when_its_time_is_over(one: Served) -> None:
    """Before it has a slot here, and alone: those beside it go on."""
    late = replace(request(PROMPT, **ENDLESS), ids=("late-0", "late-1"), timeout=0.0)
    on_time = replace(request(PROMPT, max_tokens=5, **FREE), timeout=600.0)
    first, second, third = one.run(outcomes(one.engine, late, on_time))
    assert [found.end.reason for found in (first, second, third)] == ["timeout", "timeout", "length"]
    assert first.end.error == "it still waited for a slot"
    assert (first.ids, third.end.error) == ((), None)
    one.run(idle(one))
    assert one.engine.stats().finished["timeout"] == 2


def test_profiles_must_fit_the_model(one: Served) -> None:
    foreign = random_profile(wrap_model(tiny_model("qwen2"), tiny_tokenizer()))
    with pytest.raises(ProfileMismatch, match="whose weights differ"):
        one.run(one.engine.load_profile(foreign))


# Leaving.


@pytest.mark.parametrize("way", ["aclose", "drop", "cancel the task"])
def test_leaving_a_stream_cancels_what_has_not_finished(one: Served, way: str) -> None:
    async def main() -> tuple[int, int]:
        engine = one.engine
        await idle(one)
        before = engine.stats().finished
        # three times as many as run at once: whatever is finished when a slow client leaves, some have not begun
        asked = replace(request(PROMPT, **ENDLESS), ids=tuple(f"{way}-{place}" for place in range(12)))
        if way == "cancel the task":
            task = asyncio.create_task(collect(one, asked))
            while not engine.stats().running:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            stream = await submit(engine, asked)
            await anext(stream)
            if way == "aclose":
                await stream.aclose()
            del stream
            gc.collect(0)  # of all objects it takes so long that every text is finished
        await idle(one)
        after = engine.stats().finished
        return sum(after.values()) - sum(before.values()), after["cancelled"] - before.get("cancelled", 0)

    ended, cancelled = one.run(main())
    assert ended == 12
    assert cancelled >= 4


def test_a_submit_that_is_cancelled_runs_nothing(one: Served) -> None:
    async def main() -> None:
        asked = replace(request(PROMPT, **{**ENDLESS, "ignore_eos": False}), constraint=Constraint("regex", "[a-z]+"))
        task = asyncio.create_task(submit(one.engine, asked))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await outcome(one.engine, request(PROMPT, max_tokens=1))
        await idle(one)

    one.run(main())


# Live changes.


@pytest.mark.parametrize(
    "change",
    [-1.0, 0.0, StrengthSchedule(((0, -1.0), (2, 1.0), (5, 0.0))), StrengthSchedule(((0, -1.0), (6, 1.0)), "linear")],
    ids=["strength", "zero", "steps", "line"],
)
def test_a_changed_plan_holds_from_the_acknowledged_token_on(one: Served, warm: Profile, change: Any) -> None:
    """A change at token k gives what a plan with this schedule from k on gives from the beginning."""
    before, after = plan(warm, 0.5), plan(warm, change)
    length = 190

    async def once() -> tuple[list[int], Any, Finished]:
        ids: list[int] = []
        asked = request(PROMPT, before, max_tokens=length, **FREE)
        changed = None
        async for event in await submit(one.engine, asked):
            if isinstance(event, Finished):
                return ids, changed, event
            assert isinstance(event, Delta)
            ids += event.token_ids
            if changed is None and len(ids) > 2:
                changed = await one.engine.set_steering(asked.ids[0], after)
        raise AssertionError

    async def main() -> tuple[list[int], Any, Finished]:
        await load(one.engine, after.versions)
        for _ in range(9):  # a slow machine may ask for the change when the text is at its end
            with suppress(Conflict):
                return await once()
        raise AssertionError("each text had ended when the change came")

    ids, changed, end = one.run(main())
    first = changed.from_token
    assert 3 <= first < length
    assert changed.position == len(PROMPT) + first - 1
    strengths = [(0, 0.5), *((first + token, after.terms[0].at(token)) for token in range(length - first))]
    planned = one.run(outcome(one.engine, request(PROMPT, plan(warm, steps(*strengths)), max_tokens=length, **FREE)))
    assert tuple(ids) == planned.ids
    assert [segment.from_token for segment in end.segments] == [0, first]
    assert end.segments[1].plan.terms[0].schedule == (change if isinstance(change, StrengthSchedule) else None)
    assert end.steered_tokens == planned.end.steered_tokens


def test_what_is_not_live_cannot_be_changed(one: Served, warm: Profile, language_model: LanguageModel) -> None:
    gate = Gate(1, torch.ones(language_model.hidden_size), 0.0, "above")
    gated = versioned(replace(warm, name="gated", unit=1.25, gate=gate))

    async def main() -> None:
        over = request(PROMPT, plan(warm), max_tokens=1, **FREE)
        await outcome(one.engine, over)
        with pytest.raises(Conflict, match="has ended"):
            await one.engine.set_steering(over.ids[0], plan(warm))
        with pytest.raises(UnknownGeneration):
            await one.engine.set_steering("never", plan(warm))
        running = request(PROMPT, **ENDLESS)
        stream = await submit(one.engine, running)
        joining = plan(gated)
        await load(one.engine, joining.versions)
        for plan_, error in (
            (joining, SteeringError),
            (plan(warm, 9.0), SteeringError),
            (SteeringPlan((PlanTerm("never", "0" * 64),)), UnknownProfile),
        ):
            with pytest.raises(error):
                await one.engine.set_steering(running.ids[0], plan_)
        await stream.aclose()

    one.run(main())
    one.run(idle(one))


# Receipts.


def test_receipts_say_what_was_applied(one: Served, warm: Profile, cold: Profile) -> None:
    schedule = steps((0, 0.0), (4, 1.0))
    asked = request(PROMPT, SteeringPlan((term(warm, 0.5), term(cold, schedule, (2,)))), max_tokens=10, **FREE)
    (segment,) = one.run(outcome(one.engine, asked)).end.segments
    first, second = segment.terms
    assert segment.plan == asked.plan
    assert (first.term, second.term) == asked.plan.terms
    assert (first.operator, first.layers, second.layers) == ("add", warm.layers, (2,))
    assert (first.steered_tokens, second.steered_tokens) == (10, 6)
    assert [term.calibrated for term in segment.terms] == [False, False]  # a mix is not what was calibrated
    (alone,) = one.run(outcome(one.engine, request(PROMPT, plan(warm), max_tokens=2, **FREE))).end.segments
    assert alone.terms[0].calibrated


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_gate_is_decided_by_the_prompt(one: Served, warm: Profile, side: Any, language_model: LanguageModel) -> None:
    gate = Gate(1, torch.ones(language_model.hidden_size), 2.0, side)  # similarities are below 2
    gated = replace(warm, name=f"gated-{side}", version=f"gated-{side}", gate=gate)
    wish: dict[str, Any] = {"max_tokens": 6, **FREE}
    asked = [request(PROMPT, plan(gated), **wish), request(PROMPT, plan(warm), **wish), request(PROMPT, **wish)]
    found, steered, plain = one.run(outcomes(one.engine, *asked))
    opened = side == "below"
    assert found.ids == (steered.ids if opened else plain.ids)
    assert found.end.gates[gated.name].opened is opened
    (applied,) = found.end.segments[0].terms
    assert (applied.gate_closed, bool(applied.layers), applied.steered_tokens) == (not opened, opened, 6 * opened)


# What is asked for beside the text.


def test_divergences_and_projections(one: Served, warm: Profile) -> None:
    asked = replace(request(PROMPT, plan(warm), max_tokens=5, **FREE), divergence=True, projections=(warm.version,))
    idle_ = replace(asked, ids=("idle",), plan=plan(warm, 0.0))
    events = one.run(collect(one, asked, idle_))

    def told(name: str) -> list[Delta]:
        return [event for event in events if isinstance(event, Delta) and event.id == name]

    steered, plain = told(asked.ids[0]), told("idle")
    assert all(len(one.divergences) == len(one.projections) == len(one.token_ids) for one in (*steered, *plain))
    assert all(one.divergences[0] > 0 for one in steered if one.token_ids)
    assert all(one.divergences == (0.0,) for one in plain if one.token_ids)
    assert steered[0].projections[0][0] > plain[0].projections[0][0]


def test_a_plan_is_explained(one: Served, warm: Profile, cold: Profile) -> None:
    asked = SteeringPlan((term(warm, 0.5), term(cold, -0.25)))
    one.run(load(one.engine, asked.versions))
    effect = one.run(one.engine.explain(asked))
    assert [term.applied.term for term in effect.terms] == list(asked.terms)
    assert [term.kl_at_1 for term in effect.terms] == [0.1, None]
    shift = 0.5 * warm.directions[2] - 0.25 * cold.directions[2]
    norms = {block.block: block.shift_norm for block in effect.blocks}
    assert norms[2] == pytest.approx(float(shift.norm()), rel=1e-5)
    with pytest.raises(SteeringError):
        one.run(one.engine.explain(plan(warm, 9.0)))


# Ends of texts.


def test_stop_strings_wait_for_min_tokens(one: Served) -> None:
    whole = one.run(outcome(one.engine, request(PROMPT, max_tokens=40, **FREE)))
    early = next(text for text in whole.deltas if text.strip())
    stopped = one.run(outcome(one.engine, request(PROMPT, max_tokens=40, stop=(early,), **FREE)))
    assert (stopped.end.reason, stopped.end.matched_stop) == ("stop", early)
    held = one.run(outcome(one.engine, request(PROMPT, max_tokens=40, min_tokens=40, stop=(early,), **FREE)))
    assert (held.end.reason, held.text) == ("length", whole.text)
    least = stopped.end.completion_tokens + 3
    later = one.run(outcome(one.engine, request(PROMPT, max_tokens=40, min_tokens=least, stop=(early,), **FREE)))
    assert later.end.completion_tokens > least
    assert whole.text.startswith(later.text)


def test_a_special_token_may_be_a_stop_string(one: Served) -> None:
    """Texts do not show it, so it is the token that ends them."""
    special = "</s>"
    token = one.engine.info.tokenizer.convert_tokens_to_ids(special)
    wish: dict[str, Any] = {"ignore_eos": True, "logit_bias": {token: 100.0}, "stop": (special,)}
    found = one.run(outcome(one.engine, request(PROMPT, max_tokens=9, **wish)))
    assert (found.end.reason, found.end.matched_stop, found.text) == ("stop", special, "")
    held = one.run(outcome(one.engine, request(PROMPT, max_tokens=9, min_tokens=3, **wish)))
    assert (held.end.reason, held.end.matched_stop, held.end.completion_tokens) == ("stop", special, 4)
    assert token not in held.ids


def test_a_constraint_holds(one: Served) -> None:
    asked = replace(
        request(PROMPT, temperature=1.5, seed=1, max_tokens=30), constraint=Constraint("regex", "(a|b){4}!")
    )
    found = one.run(outcome(one.engine, asked))
    assert found.end.reason == "stop"
    assert len(found.text) == 5
    assert set(found.text[:4]) <= {"a", "b"}


# Profiles, counts and the end.


def test_a_version_stays_until_the_last_one_lets_go(one: Served, language_model: LanguageModel) -> None:
    profile = random_profile(language_model, "counted", seed=77)
    asked = SteeringPlan((PlanTerm("counted", profile.version),))

    async def main() -> None:
        engine = one.engine
        await engine.load_profile(profile)
        await engine.load_profile(profile)
        await engine.unload_profile(profile.version)
        assert (await engine.explain(asked)).terms
        running = replace(request(PROMPT, asked, **ENDLESS), ids=tuple(f"holds-{place}" for place in range(8)))
        stream = await engine.submit([running])
        await anext(stream)
        await engine.unload_profile(profile.version)
        assert (await engine.explain(asked)).terms  # the running request holds it
        await stream.aclose()
        await idle(one)
        with pytest.raises(UnknownProfile):
            await engine.explain(asked)

    one.run(main())


def test_stats_add_up(one: Served, warm: Profile) -> None:
    async def main() -> None:
        await idle(one)
        before = one.engine.stats()
        asked = replace(request((1, 2, 3), plan(warm), max_tokens=7, **FREE), ids=("s1", "s2"))
        await outcomes(one.engine, asked)
        after = one.engine.stats()
        assert after.running == after.waiting == 0
        assert after.generated_tokens - before.generated_tokens == 14
        assert after.steered_tokens - before.steered_tokens == 14
        assert after.finished["length"] - before.finished.get("length", 0) == 2
        read = after.prompt_tokens + after.cached_tokens - before.prompt_tokens - before.cached_tokens
        assert read == 2 * 3
        assert after.steps > before.steps

    one.run(main())


def test_closing_ends_what_runs_and_refuses_what_comes(kind: str) -> None:
    with served(kind, slots=1, context=250) as one:

        async def main() -> None:
            rows = [request(PROMPT, **ENDLESS) for _ in range(3)]
            streams = [await submit(one.engine, row) for row in rows]
            await one.engine.close()
            for stream in streams:
                events = [event async for event in stream]
                assert isinstance(events[-1], Finished)
                assert events[-1].reason == "cancelled"
            for call in (one.engine.submit([request(PROMPT)]), one.engine.explain(SteeringPlan())):
                with pytest.raises(Unavailable):
                    await call

        one.run(main())


def test_sampling_parameters_are_checked_when_they_are_made() -> None:
    with pytest.raises(RequestError) as failure:
        SamplingParameters(temperature=-1)
    assert failure.value.param == "temperature"
