"""Which tokens of which requests run in the next step. It imports no torch.

Slots are shared evenly between tenants. A request takes the lowest free slot and reuses what the slots hold of its
prompt. The rest of the prompt is computed in chunks that share a budget of tokens per step; then the request decodes
one token per step. Requests join and leave between steps.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection

from server.engines.torch.scheduling.budget import PrefillBudget
from server.engines.torch.scheduling.policies import choose_leader, group_by_length, share_budget
from server.engines.torch.scheduling.prefix_reuse import MIN_REUSED_TOKENS, PrefixCache
from server.engines.torch.scheduling.request_state import Chunk, RequestState
from server.engines.torch.scheduling.waiting import WaitingRequests

IDLE_PREFILL_FACTOR = 4


class Scheduler:
    """`add`, `admit`, `schedule`, `advance`, `remove`.

    `chunk_tokens` bounds the prompt tokens computed in one step, and `budget` those of a step in which rows decode.
    While none does, it may be `IDLE_PREFILL_FACTOR` times as many: then only new requests wait.
    """

    def __init__(
        self,
        *,
        slots: int,
        chunk_tokens: int,
        prefixes: PrefixCache | None = None,
        budget: PrefillBudget | None = None,
    ) -> None:
        self.num_slots = slots
        self._budget = budget or PrefillBudget(chunk_tokens)
        self._prefixes = prefixes or PrefixCache(slots, None)
        self._chunk_tokens = chunk_tokens
        self._free = list(range(slots))
        self._waiting = WaitingRequests()
        self._held: Counter[str] = Counter()  # slots, by tenant
        self._running: dict[str, RequestState] = {}
        self.kv_tokens = 0  # of running requests, in all their slots

    @property
    def waiting(self) -> WaitingRequests:
        return self._waiting

    @property
    def running(self) -> Collection[RequestState]:
        return self._running.values()

    @property
    def slots_used(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose KV is kept in free slots."""
        return self._prefixes.kept(tuple(self._free))

    @property
    def has_work(self) -> bool:
        return bool(self._running or len(self._waiting))

    def add(self, state: RequestState) -> None:
        """Let a request wait for a slot."""
        self._waiting.add(state)

    def admit(self) -> list[RequestState]:
        """Give free slots to waiting requests, by turns between tenants; returns those that were admitted."""
        for state in self._running.values():
            if state.leader is not None and not state.is_following:
                self._begin(state)
        admitted = []
        while (waiting := self._waiting.next(self._held)) and len(self._free) >= 1 + waiting.request.divergence:
            self._waiting.take(waiting)
            self._place(waiting)
            admitted.append(waiting)
        return admitted

    def _place(self, state: RequestState) -> None:
        """Give a request its slots."""
        self._running[state.id] = state  # before anything can fail, so that it can be ended and its slots freed
        state.slot = heapq.heappop(self._free)
        if state.request.divergence:
            state.unsteered_slot = heapq.heappop(self._free)
        self._held[state.request.tenant] += len(state.slots)
        for slot in state.slots:
            self._prefixes.evict(slot, self._free, state.reusable)
        self._begin(state)

    def schedule(self) -> list[list[Chunk]]:
        """The forward passes of the next step, each with its chunks in order of slots: first chunks of prompts, grouped
        by length, then single tokens, of decoding rows and of prompts that lack one token."""
        states = sorted(self._running.values(), key=lambda state: state.slot)
        ones = [Chunk(state, state.computed, len(state.ids)) for state in states if state.is_decoding]
        prompts = [state for state in states if not state.is_decoding and state.leader is None]
        budget = self._budget.tokens() if ones else self._chunk_tokens * IDLE_PREFILL_FACTOR
        chunks = share_budget(prompts, budget)
        ones += [chunk for chunk in chunks if len(chunk) == 1 and not chunk.scores]
        passes = group_by_length([chunk for chunk in chunks if chunk.scores])
        passes += group_by_length([chunk for chunk in chunks if len(chunk) > 1 and not chunk.scores])
        return [sorted(one, key=lambda chunk: chunk.slot) for one in [*passes, ones] if one]

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk's KV has been computed."""
        state, steering, tenant = chunk.state, chunk.state.steering, chunk.state.request.tenant
        self._prefixes.record(chunk.slot, chunk.start, chunk.ids, steering.steered_from, steering.digest, tenant)
        if state.unsteered_slot is not None:
            self._prefixes.record(state.unsteered_slot, chunk.start, chunk.ids, None, "", tenant)
        self._set_computed(state, chunk.end)
        steering.count(chunk.steered_positions)

    def remove(self, state: RequestState, *, keep: bool = True) -> None:
        """Take a request out, wherever it is, and free its slots; `keep` what they hold for others."""
        if self._running.pop(state.id, None) is None:
            self._waiting.remove(state)
            return
        self.kv_tokens -= state.computed * len(state.slots)
        self._held -= Counter({state.request.tenant: len(state.slots)})  # drops it at 0
        for slot in state.slots:
            heapq.heappush(self._free, slot)
            if keep:
                self._prefixes.release(slot, continued=state.continued)
            else:
                self._prefixes.forget(slot)

    def forget_prefixes(self) -> None:
        """Reuse nothing of what the slots hold."""
        for slot in range(self.num_slots):
            self._prefixes.forget(slot)

    def check_integrity(self) -> None:
        """Every slot is free or held by exactly one running request; for tests."""
        held = [slot for state in self._running.values() for slot in state.slots]
        assert sorted(held + self._free) == list(range(self.num_slots)), (held, self._free)
        assert self._held.total() == len(held)
        assert self.kv_tokens == sum(state.computed * len(state.slots) for state in self._running.values())

    def _begin(self, state: RequestState) -> None:
        """Reuse what is computed of a prompt already, or wait for the request that is computing more of it."""
        wanted = state.reusable
        source, shared = self._prefixes.longest(wanted)
        if any(slot != source for slot in state.slots) and shared < MIN_REUSED_TOKENS:
            source, shared = state.slot, 0
        state.leader, state.awaited = (
            choose_leader(state, self._running.values(), wanted) if self._prefixes.reuses else (None, 0)
        )
        if state.awaited - shared >= MIN_REUSED_TOKENS:
            return
        for slot in state.slots:
            self._prefixes.copy_prefix(slot, source if shared else slot, shared)
        self._set_computed(state, shared)
        state.reuse(shared)

    def _set_computed(self, state: RequestState, length: int) -> None:
        self.kv_tokens += (length - state.computed) * len(state.slots)
        state.computed = length
