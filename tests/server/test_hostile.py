"""Hundreds of hostile bodies, seeded: none is a fault of the server, and /health answers meanwhile."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.reliability.hostile import attack, hostile
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=128, max_queue=60)
profiles = profiles_fixture("warm")
client = client_fixture()


def test_hostile_bodies_are_refused_or_answered(client: httpx.Client) -> None:
    outcome = attack(str(client.base_url), enumerate(hostile(0, 200, size=3000)))
    print(
        f"\n{dict(sorted(outcome.statuses.items()))}, /health waited for {1000 * outcome.longest_wait:.0f} ms at most"
    )
    assert sum(outcome.statuses.values()) == 200
    assert set(outcome.statuses) <= {200, 400, 404, 429}
    assert {200, 400} <= set(outcome.statuses)
    until(lambda: client.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200)
