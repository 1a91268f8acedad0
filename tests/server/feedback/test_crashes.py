"""kill -9 at random points, while votes with idempotency keys are sent and sent again: none that was acknowledged is
lost, and none is counted twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from server.feedback import queries
from server.feedback.database import Database
from server.feedback.items import Filter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 20
VOTES = 400
AT_ONCE = 16  # votes on their way


def killed_once(url: str, waiting: list[int], acknowledged: dict[int, str], after: int | None) -> None:
    """Send votes to a new server until so many were acknowledged, and kill it then; None lets it end."""
    command = [sys.executable, "-m", "tests.support.feedback_server", url]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    sending = list(waiting)
    on_their_way = 0
    seen = 0
    while waiting and (after is None or seen < after):
        while sending and on_their_way < AT_ONCE:
            server.stdin.write(f"{sending.pop()}\n")
            on_their_way += 1
        server.stdin.flush()
        number, name = json.loads(server.stdout.readline())
        assert acknowledged.setdefault(number, name) == name  # the same answer whenever it is sent again
        if number in waiting:
            waiting.remove(number)
        on_their_way -= 1
        seen += 1
    if after is not None:
        server.kill()
    server.stdin.close()
    for line in server.stdout:  # acknowledged while it was killed
        if line.endswith("]\n"):
            number, name = json.loads(line)
            assert acknowledged.setdefault(number, name) == name
    server.wait(60)
    server.stdout.close()


def test_no_vote_is_lost_or_counted_twice(url: str) -> None:
    draw = random.Random(7)
    waiting = list(range(VOTES))
    acknowledged: dict[int, str] = {}
    for _ in range(KILLS):
        killed_once(url, waiting, acknowledged, after=draw.randrange(1, 24))
        # a client whose answer was lost sends the vote again, and sometimes one whose answer it has
        waiting += draw.sample(sorted(set(acknowledged) - set(waiting)), 3)
        draw.shuffle(waiting)
    killed_once(url, waiting, acknowledged, after=None)
    assert waiting == []
    database = Database(url)
    with database.reading() as connection:
        stored = list(queries.everything(connection, Filter()))
    database.close()
    assert Counter(one.idempotency_key for one in stored) == Counter(f"vote-{number}" for number in range(VOTES))
    assert {one.idempotency_key: one.id for one in stored} == {f"vote-{n}": name for n, name in acknowledged.items()}
    for one in stored:
        assert one.idempotency_key is not None
        number = one.idempotency_key.removeprefix("vote-")
        assert [answer["text"] for answer in one.answers] == [f"good {number}", f"bad {number}"]
