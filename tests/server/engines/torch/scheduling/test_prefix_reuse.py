"""What slots share: traces, copies and waiting, without a model."""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.protocol import SteeringPlan
from server.engines.torch.plans import ResolvedPlan
from server.engines.torch.scheduling.prefix_reuse import MIN_REUSED_TOKENS, PrefixCache, PrefixKey
from server.engines.torch.scheduling.request_state import Chunk, RequestState
from server.engines.torch.scheduling.scheduler import Scheduler
from tests.support.running import KNOWN, plan, state
from tests.support.tiny_profiles import tiny_profile

PLANS = [SteeringPlan()] + [
    plan(tiny_profile(name=name, version=name * 64), strength, apply_to=apply_to)
    for name in "ab"
    for strength in (0.0, 1.0)
    for apply_to in ("generated", "all")
]
PIECES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["", "a", "b"])), max_size=5)


def traced(pieces: list[tuple[int, str]]) -> tuple[PrefixKey, list[tuple[int, str]]]:
    """A trace, and what was done at each of its positions."""
    trace, plain = PrefixKey(), []
    for length, digest in pieces:
        ids = [7] * length
        trace.extend(len(trace), ids, len(trace), digest)
        plain += [(token, digest) for token in ids]
    return trace, plain


@given(PIECES, PIECES, st.integers(0, 20))
def test_traces_share_what_comes_before_the_first_difference(
    one: list[tuple[int, str]], other: list[tuple[int, str]], cut: int
) -> None:
    (first, plain), (second, other_plain) = traced(one), traced(other)
    expected = next(
        (place for place, (a, b) in enumerate(zip(plain, other_plain, strict=False)) if a != b),
        min(len(plain), len(other_plain)),
    )
    assert first.shared(second) == second.shared(first) == expected
    assert first.head(cut).shared(first) == min(cut, len(plain))
    second.cut(cut)
    assert first.shared(second) == min(cut, expected)


def test_a_trace_tells_where_steering_began() -> None:
    trace = PrefixKey.of([1, 2, 3, 4], 3, "a")
    assert trace.spans == [(0, ""), (3, "a")]
    trace.extend(4, [5], 3, "a")
    assert trace.spans == [(0, ""), (3, "a")]
    trace.extend(2, [9, 9], None, "")
    assert (trace.ids, trace.spans) == ([1, 2, 9, 9], [(0, "")])


def test_a_head_has_no_span_beyond_its_end() -> None:
    assert PrefixKey([7] * 10, [(0, ""), (5, "a")]).head(5) == PrefixKey([7] * 5, [(0, "")])


def test_keys_share_no_more_than_their_tokens() -> None:
    one, other = [1] * 20, [1, 1, 1, *[2] * 17]
    assert PrefixKey(one, [(0, ""), (10, "a")]).shared(PrefixKey(other, [(0, ""), (12, "b")])) == 3
    long = [1] * 200
    assert PrefixKey(long).shared(PrefixKey([*long[:150], 2, *long[151:]])) == 150


class Keys:
    """Keys and values as what they follow from: each entry is a hash of the tenant, all tokens and steering so far."""

    def __init__(self, slots: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(slots)]

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.slots[source]), "keys that were never computed"
        self.slots[target][:length] = self.slots[source][:length]

    def swap(self, one: int, other: int, length: int) -> None:
        held = self.slots[one], self.slots[other]
        self.slots[one], self.slots[other] = held[1][:length], held[0][:length]

    def compute(self, chunk: Chunk) -> None:
        for slot in chunk.state.slots:
            held = self.slots[slot]
            assert chunk.start <= len(held), "a hole"
            del held[chunk.start :]
            for position, token in zip(range(chunk.start, chunk.end), chunk.ids, strict=True):
                first = chunk.state.steering.steered_from if slot == chunk.slot else None
                digest = chunk.state.steering.digest if first is not None and position >= first else ""
                held.append(hash((held[-1] if held else chunk.state.request.tenant, token, digest)))


class Run:
    """A scheduler over such keys. It draws a token for every row that may have one, and checks all that is held."""

    def __init__(self, slots: int, chunk_tokens: int = 16, *, shares: bool = True) -> None:
        self.keys = Keys(slots)
        self.prefixes = PrefixCache(slots, self.keys if shares else None)
        self.scheduler = Scheduler(slots=slots, chunk_tokens=chunk_tokens, prefixes=self.prefixes)
        self.timelines: dict[str, list[str]] = {}  # digest by position, as it was computed
        self.computed = 0
        self._names = count()

    def add(self, prompt: list[int], plan: SteeringPlan | None = None, **fields: object) -> RequestState:
        added = state(prompt, plan, f"r{next(self._names)}", **fields)
        self.scheduler.add(added)
        return added

    def step(self, token: int = 0) -> None:
        self.scheduler.admit()
        for chunk in [chunk for batch in self.scheduler.schedule() for chunk in batch]:
            self.keys.compute(chunk)
            self.computed += chunk.end - chunk.start
            draws = chunk.samples
            self.scheduler.advance(chunk)
            if draws:
                chunk.state.ids.append(token)
        self.check()

    def finish(self, ended: RequestState, *, keep: bool = True) -> None:
        ended.finish = "stop"
        self.scheduler.remove(ended, keep=keep)

    def run(self, ended: RequestState, tokens: int = 1) -> None:
        while ended.completion_length < tokens:
            self.step()
        self.finish(ended)

    def check(self) -> None:
        """What the traces say is what the keys were made from."""
        self.scheduler.check_integrity()
        for slot, held in enumerate(self.keys.slots):
            trace = self.prefixes.key(slot)
            if not self.prefixes.reuses or not len(trace):
                continue
            scratch: object = trace.tenant
            starts = dict(trace.spans)
            digest = ""
            for position, token in enumerate(trace.ids):
                digest = starts.get(position, digest)
                scratch = hash((scratch, token, digest))
                assert held[position] == scratch


def test_tenants_share_nothing() -> None:
    ids = list(range(30))
    keys = [PrefixKey.of(ids, None, "", tenant) for tenant in ("", "a", "b")]
    assert [[one.shared(other) for other in keys] for one in keys] == [[30, 0, 0], [0, 30, 0], [0, 0, 30]]
    assert keys[1].head(10).shared(keys[1]) == 10
    assert keys[1].head(10).shared(keys[0]) == 0


def test_a_prompt_is_computed_once_for_each_tenant() -> None:
    run = Run(6)
    prompt = list(range(1, 41))
    rows = [run.add(prompt, tenant=tenant) for tenant in ("a", "b", "a", "b", "")]
    while not all(row.completion_length for row in rows):
        run.step()
    assert [row.cached for row in rows] == [0, 0, 39, 39, 0]  # also of prompts that are being computed
    for row in rows:
        run.finish(row)
    for tenant, expected in (("a", 39), ("b", 39), ("c", 0), ("", 39), ("c", 39)):
        one = run.add(prompt, tenant=tenant)
        run.run(one)
        assert one.cached == expected, tenant


def test_a_chat_computes_its_tail_only() -> None:
    run = Run(4)
    prompt = list(range(1, 41))
    first = run.add(prompt)
    run.run(first, tokens=10)
    second = run.add([*first.ids, *range(50, 60)])
    run.run(second)
    assert second.cached == len(first.ids) - 1  # the last token was drawn and never computed
    assert run.computed == 40 + 9 + 11


def test_steering_that_differs_shares_the_unsteered_part() -> None:
    run = Run(4)
    prompt = list(range(1, 41))
    warm, cold = (PLANS[3], PLANS[7])
    assert (warm.apply_to, cold.apply_to) == ("generated", "generated")
    first = run.add(prompt, warm)
    run.run(first, tokens=10)
    second = run.add([*first.ids, 99], cold)
    run.run(second)
    assert second.cached == len(prompt) - 1
    everywhere = run.add([*first.ids, 99], PLANS[4])
    run.run(everywhere)
    assert (PLANS[4].apply_to, everywhere.cached) == ("all", 0)
    again = run.add([*first.ids, 98], PLANS[4])
    run.run(again)
    assert again.cached == len(first.ids)
    assert again.steering.steered_tokens == len(again.ids) - 1  # however they came to be


def test_at_most_all_but_the_last_token_are_reused() -> None:
    run = Run(2)
    prompt = list(range(1, 31))
    for expected in (0, 29, 29):
        one = run.add(prompt)
        run.run(one)
        assert one.cached == expected


def test_choices_of_one_prompt_compute_it_once() -> None:
    run = Run(8)
    prompt = list(range(1, 101))
    rows = [run.add(prompt, one) for one in PLANS if one.apply_to == "generated"]
    while not all(row.completion_length for row in rows):
        run.step()
    assert run.computed == 100 + (len(rows) - 1) + run_on(rows)
    assert [row.cached for row in rows] == [0] + [99] * (len(rows) - 1)


def test_those_that_wait_for_one_prompt_begin_together() -> None:
    """They all follow the one that computes it, and not each other."""
    run = Run(4)
    prompt = list(range(1, 101))
    rows = [run.add(prompt) for _ in range(4)]
    while not rows[0].completion_length:
        run.step()
    leaders = [row.leader for row in rows]
    run.step()
    assert [row.completion_length for row in rows] == [2, 1, 1, 1]
    assert leaders == [None, *[rows[0]] * 3]


def run_on(rows: list[RequestState]) -> int:
    """Tokens that were computed after the prompts."""
    return sum(row.completion_length - 1 for row in rows)


def test_one_that_waits_goes_on_when_its_leader_ends() -> None:
    run = Run(4, chunk_tokens=3)
    prompt = list(range(1, 101))
    leader, follower, third = (run.add(prompt) for _ in range(3))
    run.step()
    assert (leader.computed, follower.computed, follower.leader) == (12, 0, leader)
    run.finish(leader, keep=False)
    run.step()
    assert (follower.computed, third.leader) == (12, follower)
    run.run(follower)
    run.step()
    assert third.cached == 99


def test_what_is_displaced_moves_to_the_slot_that_is_missed_least() -> None:
    run = Run(3)
    talks = [[base + place for place in range(20)] for base in (100, 200, 300)]
    for talk in talks:
        run.run(run.add(talk))
    for talk in talks:
        again = run.add([*talk, 1])
        run.run(again)
        assert again.cached == 20
        assert again.slot == 0
    run.run(run.add([base + 400 for base in range(20)]))  # a fourth: the one that was used longest ago goes
    oldest = run.add([*talks[0], 1])
    run.run(oldest)
    assert oldest.cached == 0


def test_what_was_only_scored_is_not_kept_for_long() -> None:
    run = Run(2)
    talk = list(range(1, 31))
    run.run(run.add(talk))
    for base in (100, 200, 300):
        run.run(run.add([base + place for place in range(20)], prompt_logprobs=0))
    again = run.add([*talk, 1])
    run.run(again)
    assert again.cached == 30


@pytest.mark.parametrize("unseen", [{"prompt_logprobs": 0}])
def test_what_must_be_seen_is_computed(unseen: dict[str, object]) -> None:
    run = Run(2)
    prompt = list(range(1, 31))
    run.run(run.add(prompt))
    scored = run.add(prompt, **unseen)
    run.run(scored)
    assert scored.cached == 0
    given = run.add(prompt, scored_suffix=5, **unseen)
    run.run(given)
    assert given.cached == 30 - 5 - 1


def test_a_few_tokens_are_computed_not_copied() -> None:
    run = Run(4)
    long = list(range(1, 41))
    running = run.add(long)
    while not running.completion_length:
        run.step()
    few = run.add([*long[: MIN_REUSED_TOKENS - 1], 99])
    many = run.add([*long[:MIN_REUSED_TOKENS], 99])
    run.step()
    assert (few.cached, many.cached) == (0, MIN_REUSED_TOKENS)


def test_without_a_copier_nothing_is_shared() -> None:
    run = Run(2, shares=False)
    prompt = list(range(1, 31))
    for _ in range(2):
        one = run.add(prompt)
        run.run(one)
        assert one.cached == 0


class Moves:
    """Columns that note what is moved."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def copy(self, source: int, target: int, length: int) -> None:
        self.seen.append(("copy", source, target, length))

    def swap(self, one: int, other: int, length: int) -> None:
        self.seen.append(("swap", one, other, length))


def tokens_of(slot: int, length: int = 20) -> list[int]:
    return [100 * slot + place for place in range(1, length + 1)]


def cache_of(*lengths: int, released: dict[int, bool]) -> tuple[PrefixCache, Moves]:
    """A cache whose slots hold texts of these lengths, released in this order: whether each is continued."""
    moves = Moves()
    cache = PrefixCache(len(lengths), moves)
    for slot, length in enumerate(lengths):
        cache.record(slot, 0, tokens_of(slot, length), None, "")
    for slot, continued in released.items():
        cache.release(slot, continued=continued)
    return cache, moves


OTHER = PrefixKey.of([9] * 30, None, "")  # a prompt that no slot holds


@pytest.mark.parametrize(("copied", "target"), [(10, 0), (9, 1), (7, 1)])
def test_a_text_that_goes_on_elsewhere_is_missed_least(copied: int, target: int) -> None:
    """Slot 0 was released after slot 1. If at least half of it is copied, the copy goes on."""
    cache, moves = cache_of(20, 20, 0, 20, released={1: True, 0: True, 3: True})
    cache.copy_prefix(2, 0, copied)
    cache.evict(3, {0, 1}, OTHER)
    assert moves.seen == [("copy", 0, 2, copied), ("copy", 3, target, 20)]
    assert cache.key(target).ids == tokens_of(3)


@pytest.mark.parametrize(
    ("lengths", "released", "moved"),
    [
        ((20, 20, 20), {1: True, 0: False, 2: True}, (0, 20)),  # slot 0 is not continued
        ((20, 20, 20), {0: True, 1: True, 2: True}, (0, 20)),  # slot 0 was released first
        ((0, 0, 20), {2: True}, (1, 20)),  # of equal slots the last
        ((20, 20, MIN_REUSED_TOKENS), {0: True, 1: True, 2: True}, (0, MIN_REUSED_TOKENS)),
        ((20, 20, MIN_REUSED_TOKENS - 1), {0: True, 1: True, 2: True}, None),  # too short to be kept
        ((MIN_REUSED_TOKENS - 1, 20, 20), {1: True, 0: True, 2: True}, (0, 20)),  # slot 0 is too short to be missed
        ((MIN_REUSED_TOKENS, 20, 20), {1: True, 0: True, 2: True}, (1, 20)),
        ((20, 20, 20), {0: True, 1: True, 2: False}, None),  # missed less than the others
        ((20, 20, 20), {0: False, 1: False, 2: False}, None),  # no more than the others
    ],
)
def test_what_is_evicted_moves_to_the_slot_that_is_missed_least(
    lengths: tuple[int, ...], released: dict[int, bool], moved: tuple[int, int] | None
) -> None:
    cache, moves = cache_of(*lengths, released=released)
    cache.evict(2, {0, 1}, OTHER)
    assert moves.seen == ([] if moved is None else [("copy", 2, *moved)])


@pytest.mark.parametrize(
    ("held", "shared", "swapped"),
    [(12, 20, True), (30, 10, True), (12, 9, False), (12, 7, False), (MIN_REUSED_TOKENS - 1, 20, False)],
)
def test_a_free_slot_that_holds_most_of_what_is_wanted_is_swapped(held: int, shared: int, swapped: bool) -> None:
    cache, moves = cache_of(held, 20, released={1: True, 0: True})
    cache.evict(0, {1}, PrefixKey.of([*tokens_of(1, shared), 9], None, ""))
    assert moves.seen == ([("swap", 0, 1, max(held, 20))] if swapped else [])
    assert cache.key(0).ids == (tokens_of(1) if swapped else tokens_of(0, held))


class Failing(Moves):
    """Columns that break in the middle of a move."""

    def copy(self, source: int, target: int, length: int) -> None:
        raise RuntimeError

    swap = copy


@pytest.mark.parametrize("move", ["copy", "evict", "swap"])
def test_a_move_that_fails_leaves_no_key_to_what_it_may_have_overwritten(move: str) -> None:
    cache, _ = cache_of(20, 20, 20, released={2: False, 1: True, 0: True})
    cache._columns = Failing()
    moves = {
        "copy": lambda: cache.copy_prefix(2, 0, 10),
        "evict": lambda: cache.evict(0, {2}, OTHER),
        "swap": lambda: cache.evict(0, {1, 2}, PrefixKey.of([*tokens_of(1), 9], None, "")),
    }
    with pytest.raises(RuntimeError):
        moves[move]()
    lost = {0, 1} if move == "swap" else {2}
    assert {slot for slot in range(3) if not len(cache.key(slot))} == lost


@pytest.mark.parametrize("columns", [None, Moves()])
def test_an_empty_prompt_and_a_model_without_columns_find_nothing(columns: Moves | None) -> None:
    cache = PrefixCache(2, columns)
    cache.release(1, continued=True)
    assert cache.longest(PrefixKey() if columns else OTHER) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_and_goes_keys_are_those_of_a_run_from_scratch(seed: int) -> None:
    """Requests that fork from each other, steered in all ways, changed and ended at any time."""
    draw = random.Random(seed)
    run = Run(draw.choice([1, 2, 3, 5]), chunk_tokens=draw.choice([3, 7, 40]))
    texts: list[list[int]] = [[draw.randrange(9) for _ in range(30)]]
    live: list[RequestState] = []
    seen: list[RequestState] = []
    for _ in range(120):
        if draw.random() < 0.4:
            base = draw.choice(texts)
            prompt = base[: draw.randrange(1, len(base) + 1)] + [draw.randrange(9) for _ in range(draw.randrange(20))]
            given = draw.randrange(1, 4) if len(prompt) > 6 and draw.random() < 0.2 else 0
            more = {"scored_suffix": given, "prompt_logprobs": 0} if given else {}
            shadowed = draw.random() < 0.2 and run.scheduler.num_slots > 1 and not given
            tenant = draw.choice(["", "a", "a"])
            live.append(run.add(prompt, draw.choice(PLANS), divergence=shadowed, tenant=tenant, **more))
            seen.append(live[-1])
            texts.append(prompt)
        if live and draw.random() < 0.1:
            changed, new = draw.choice(live), draw.choice(PLANS)
            resolved = ResolvedPlan(new, {version: KNOWN[version] for version in new.versions})
            changed.steering.change(changed.completion_length, resolved)
        run.step(draw.randrange(9))
        for one in [one for one in live if draw.random() < 0.1]:
            live.remove(one)
            texts.append(list(one.ids))
            run.finish(one, keep=draw.random() < 0.9)
    while live:
        run.step()
        for one in [one for one in live if one.completion_length]:
            live.remove(one)
            run.finish(one)
    assert any(one.cached for one in seen)
