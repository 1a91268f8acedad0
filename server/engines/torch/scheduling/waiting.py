"""The requests that wait for a slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from server.engines.torch.scheduling.policies import choose_tenant
from server.engines.torch.scheduling.request_state import RequestState


class WaitingRequests:
    """Each tenant's requests, first come first served. `choose_tenant` says whose is next."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, RequestState]] = {}  # by tenant and id; the tenant served last is the last

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[RequestState]:
        return chain.from_iterable(line.values() for line in self._lines.values())

    def add(self, state: RequestState) -> None:
        self._lines.setdefault(state.request.tenant, {})[state.id] = state

    def next(self, held: Mapping[str, int]) -> RequestState | None:
        """The request that gets the next slot; `held` has the number of slots of each tenant. None if none waits."""
        if not self._lines:
            return None
        return next(iter(self._lines[choose_tenant(self._lines, held)].values()))

    def take(self, state: RequestState) -> None:
        """Take out a request that gets a slot."""
        self.remove(state)
        tenant = state.request.tenant
        if tenant in self._lines:
            self._lines[tenant] = self._lines.pop(tenant)

    def remove(self, state: RequestState) -> None:
        tenant = state.request.tenant
        line = self._lines[tenant]
        del line[state.id]
        if not line:
            del self._lines[tenant]
