"""The choices that the scheduler makes, each a function of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from server.engines.torch.scheduling.prefix_reuse import PrefixKey
from server.engines.torch.scheduling.request_state import Chunk, RequestState

PASS_OVERHEAD_TOKENS = 128  # prompt tokens whose computing costs as much as one more pass, roughly

Sized = TypeVar("Sized", bound=Chunk)


def choose_tenant(waiting: Iterable[str], held: Mapping[str, int]) -> str:
    """Whose request gets the next slot: the tenant's who holds the fewest slots now. Of several, the first of
    `waiting`, in which whoever was served last stands last.

    So slots are shared evenly among the tenants that want them, however many requests each has and however long they
    run (max-min fairness), and a tenant that comes new gets the next slot.
    """
    return min(waiting, key=lambda tenant: held.get(tenant, 0))


def share_budget(states: Iterable[RequestState], budget: int) -> list[Chunk]:
    """One chunk of each unfinished prompt. The budget is shared evenly; what short prompts leave over goes to the
    longer ones. Each prompt gets at least one token."""
    chunks = []
    remaining = sorted(states, key=lambda state: state.prompt_length - state.computed)
    for index, state in enumerate(remaining):
        share = max(1, budget // (len(remaining) - index))
        length = min(share, state.prompt_end - state.computed)
        budget = max(0, budget - length)
        chunks.append(Chunk(state, state.computed, state.computed + length))
    return chunks


def group_by_length(chunks: Sequence[Sized]) -> list[list[Sized]]:
    """The chunks in passes, so that padding and the overhead of the passes together cost least.

    Sorted by length, a pass is a run of neighbours, and the best split into runs is found by dynamic programming.
    """
    ordered = sorted(chunks, key=len, reverse=True)
    count = len(ordered)
    costs, ends = [0] * (count + 1), [0] * count  # of the chunks from each one on, and where its pass ends
    for first in reversed(range(count)):
        width = len(ordered[first])
        costs[first], ends[first] = min(
            (PASS_OVERHEAD_TOKENS + (end - first) * width + costs[end], end) for end in range(first + 1, count + 1)
        )
    passes, first = [], 0
    while first < count:
        passes.append(ordered[first : ends[first]])
        first = ends[first]
    return passes


def choose_leader(
    state: RequestState, running: Iterable[RequestState], wanted: PrefixKey
) -> tuple[RequestState | None, int]:
    """The earlier request whose prompt, still being computed, shares the longest prefix, and its length."""
    leader, longest = None, 0
    for other in running:
        if other is state or not len(wanted):
            break
        if not other.is_decoding and (shared := other.prompt_key.shared(wanted)) > longest:
            leader, longest = other, shared
    return leader, longest
