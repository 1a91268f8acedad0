"""Slots, queue and chunks, without a model."""

from __future__ import annotations

import random

import pytest

from server.engines.torch.scheduling.budget import PrefillBudget
from server.engines.torch.scheduling.request_state import Chunk, RequestState
from server.engines.torch.scheduling.scheduler import Scheduler
from tests.support.running import plan, state, versioned
from tests.support.tiny_profiles import tiny_profile


def waiting(name: str, prompt: int) -> RequestState:
    return state(range(prompt), name=name)


def advance(scheduler: Scheduler) -> tuple[list[tuple[int, int, int]], list[int]]:
    """One step in which every finished prompt and every decoding row draws token 0."""
    chunks = sorted((chunk for batch in scheduler.schedule() for chunk in batch), key=lambda chunk: chunk.slot)
    decoding = [chunk for chunk in chunks if chunk.state.is_decoding]
    prefill = [chunk for chunk in chunks if not chunk.state.is_decoding]
    for chunk in chunks:
        draws = chunk.samples
        scheduler.advance(chunk)
        if draws:
            chunk.state.ids.append(0)
    return [(c.slot, c.start, c.end) for c in prefill], [c.slot for c in decoding]


def test_admits_in_order_into_the_lowest_slots() -> None:
    scheduler = Scheduler(slots=2, chunk_tokens=100)
    rows = [waiting(name, 3) for name in "abc"]
    for row in rows:
        scheduler.add(row)
    assert [row.id for row in scheduler.admit()] == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.remove(rows[0])
    assert scheduler.admit() == [rows[2]]
    assert rows[2].slot == 0


def tenants(scheduler: Scheduler) -> str:
    """Whose requests have slots, by slot."""
    return "".join(row.request.tenant for row in sorted(scheduler.running, key=lambda row: row.slot))


def of_tenant(tenant: str, number: int) -> RequestState:
    return state(range(3), name=f"{tenant}{number}", tenant=tenant)


def test_tenants_share_the_slots_however_many_requests_each_has() -> None:
    scheduler = Scheduler(slots=4, chunk_tokens=100)
    for number in range(40):
        scheduler.add(of_tenant("a", number))
    assert [row.id for row in scheduler.admit()] == ["a0", "a1", "a2", "a3"]
    for tenant, count in (("b", 1), ("c", 9)):
        for number in range(count):
            scheduler.add(of_tenant(tenant, number))
    served = []
    for _ in range(8):  # the one that has run longest ends
        scheduler.remove(next(iter(scheduler.running)))
        (admitted,) = scheduler.admit()
        served.append(admitted.id)
        scheduler.check_integrity()
    assert served == ["b0", "c0", "a4", "c1", "a5", "c2", "a6", "c3"]
    assert sorted(tenants(scheduler)) == ["a", "a", "c", "c"]


def test_slots_that_another_tenant_holds_for_long_do_not_count_for_a_new_one() -> None:
    scheduler = Scheduler(slots=3, chunk_tokens=100)
    for number in range(5):
        scheduler.add(of_tenant("long", number))
    scheduler.admit()
    for number in range(3):
        scheduler.add(of_tenant("short", number))
    for _ in range(3):  # a short one always ends first
        row = next((one for one in scheduler.running if one.request.tenant == "short"), None)
        scheduler.remove(row or next(iter(scheduler.running)))
        assert [one.request.tenant for one in scheduler.admit()] == ["short"]


def test_a_waiting_request_can_be_taken_out_wherever_it_is() -> None:
    scheduler = Scheduler(slots=1, chunk_tokens=100)
    rows = [of_tenant(tenant, number) for tenant in "ab" for number in range(3)]
    for row in rows:
        scheduler.add(row)
    assert list(scheduler.waiting) == rows
    for row in (rows[1], rows[3], rows[5]):
        scheduler.remove(row)
    assert list(scheduler.waiting) == [rows[0], rows[2], rows[4]]
    order = []
    while scheduler.has_work:
        for row in scheduler.admit():
            order.append(row.id)
            scheduler.remove(row)
    assert order == ["a0", "b1", "a2"]


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    scheduler = Scheduler(slots=1, chunk_tokens=1)  # four times as many while nothing decodes
    scheduler.add(waiting("a", 10))
    scheduler.admit()
    steps = [advance(scheduler) for _ in range(5)]
    assert steps == [([(0, 0, 4)], []), ([(0, 4, 8)], []), ([(0, 8, 10)], []), ([], [0]), ([], [0])]


def test_decoding_rows_run_in_every_step_beside_a_long_prompt() -> None:
    scheduler = Scheduler(slots=2, chunk_tokens=4)
    scheduler.add(waiting("short", 2))
    scheduler.admit()
    advance(scheduler)
    scheduler.add(waiting("long", 40))
    scheduler.admit()
    for _ in range(10):
        prefill, decoding = advance(scheduler)
        assert [end - start for _, start, end in prefill] == [4]
        assert decoding == [0]


def test_short_prompts_are_not_starved_by_long_ones() -> None:
    scheduler = Scheduler(slots=3, chunk_tokens=3)
    for name, prompt in (("long", 500), ("short", 3), ("middle", 8)):
        scheduler.add(waiting(name, prompt))
    scheduler.admit()
    prefill, _ = advance(scheduler)
    assert prefill == [(0, 0, 5), (1, 0, 3), (2, 0, 4)]


def test_more_prompts_than_budget_still_advance() -> None:
    scheduler = Scheduler(slots=8, chunk_tokens=3)
    for index in range(8):
        scheduler.add(waiting(str(index), 5))
    scheduler.admit()
    prefill, _ = advance(scheduler)
    assert len(prefill) == 8
    assert all(end > start for _, start, end in prefill)


@pytest.mark.parametrize("seed", range(5))
def test_random_lives_leave_every_slot_free(seed: int) -> None:
    random_ = random.Random(seed)
    scheduler = Scheduler(slots=4, chunk_tokens=8)
    for step in range(200):
        if random_.random() < 0.4:
            scheduler.add(waiting(str(step), random_.randint(1, 30)))
        scheduler.admit()
        advance(scheduler)
        for row in tuple(scheduler.running):
            if random_.random() < 0.1:
                scheduler.remove(row)
        scheduler.check_integrity()
    while scheduler.has_work:
        scheduler.admit()
        for row in tuple(scheduler.running):
            scheduler.remove(row)
    scheduler.check_integrity()


def test_steered_positions_are_counted_from_the_last_prompt_token() -> None:
    assert waiting("a", 5).steering.steered_from is None
    profile = versioned(tiny_profile())
    for steering, first in (
        (plan(profile, 0.5), 4),
        (plan(profile, 0.5, apply_to="all"), 0),
        (plan(profile, 0.0), None),
    ):
        row = state(range(5), steering)
        assert row.steering.steered_from == first
        scheduler = Scheduler(slots=1, chunk_tokens=1)  # four times as many while nothing decodes
        scheduler.add(row)
        scheduler.admit()
        counted = []
        for _ in range(4):
            advance(scheduler)
            counted.append(row.steering.steered_tokens)
        ends = [4, 5, 6, 7]
        assert counted == [0 if first is None else max(0, end - first) for end in ends]


def lengths(passes: list[list[Chunk]]) -> list[list[int]]:
    return [[len(chunk) for chunk in one] for one in passes]


def test_chunks_of_like_length_share_a_pass() -> None:
    scheduler = Scheduler(slots=6, chunk_tokens=1000)
    for name, prompt in (("a", 10), ("b", 200), ("c", 12), ("d", 1), ("e", 190), ("f", 11)):
        scheduler.add(waiting(name, prompt))
    scheduler.admit()
    assert lengths(scheduler.schedule()) == [[200, 190], [10, 12, 11], [1]]


def test_scored_chunks_have_passes_of_their_own() -> None:
    scheduler = Scheduler(slots=3, chunk_tokens=1000)
    scheduler.add(waiting("plain", 10))
    scheduler.add(state(range(10), name="scored", prompt_logprobs=0))
    scheduler.add(state([5], name="one", prompt_logprobs=0))
    scheduler.admit()
    passes = scheduler.schedule()
    assert [[chunk.state.id for chunk in one] for one in passes] == [["scored", "one"], ["plain"]]


def test_prompts_take_what_decoding_rows_can_wait_for() -> None:
    budget = PrefillBudget(100, 0.05)
    scheduler = Scheduler(slots=2, chunk_tokens=100, budget=budget)
    scheduler.add(waiting("short", 2))
    scheduler.admit()
    advance(scheduler)
    scheduler.add(waiting("long", 500))
    scheduler.admit()
    assert [end - start for _, start, end in advance(scheduler)[0]] == [100]  # nothing is known yet
    budget.note_prompts(100, 0.1)
    assert [end - start for _, start, end in advance(scheduler)[0]] == [50]
