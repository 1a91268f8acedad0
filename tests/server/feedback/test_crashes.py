"""kill -9 at random points, while votes with idempotency keys are sent and sent again: none that was answered is lost,
and none is counted twice."""

from __future__ import annotations

import random
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.common.forked import FORKS, forked, forked_server
from benchmarks.reliability import feedback_crashes
from server.feedback.database import Database
from tests.support.feedback_rows import listed
from tests.support.feedback_server import serve_votes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 20
VOTES = 400
AT_ONCE = 16  # votes on their way


def killed_once(url: str, waiting: list[int], answered: dict[int, str], after: int | None) -> None:
    """Send votes to a new server until so many were answered, and kill it then; None lets it end."""
    pipe, of_server = FORKS.Pipe()
    server = forked(serve_votes, url, of_server)
    of_server.close()
    sending = list(waiting)
    on_their_way = 0
    seen = 0
    while waiting and (after is None or seen < after):
        while sending and on_their_way < AT_ONCE:
            pipe.send(sending.pop())
            on_their_way += 1
        number = receive(pipe, answered)
        if number in waiting:
            waiting.remove(number)
        on_their_way -= 1
        seen += 1
    if after is None:
        pipe.close()
    else:
        server.kill()
        try:
            while True:
                receive(pipe, answered)  # answered while it was killed
        except (EOFError, OSError):
            pipe.close()
    server.join(60)


def receive(pipe: Connection, answered: dict[int, str]) -> int:
    number: int
    number, name = pipe.recv()
    assert answered.setdefault(number, name) == name  # the same answer whenever it is sent again
    return number


def test_no_vote_is_lost_or_counted_twice(url: str) -> None:
    draw = random.Random(7)
    waiting = list(range(VOTES))
    answered: dict[int, str] = {}
    for _ in range(KILLS):
        killed_once(url, waiting, answered, after=draw.randrange(1, 24))
        # a client whose answer was lost sends the vote again, and sometimes one whose answer it has
        waiting += draw.sample(sorted(set(answered) - set(waiting)), 3)
        draw.shuffle(waiting)
    killed_once(url, waiting, answered, after=None)
    assert waiting == []
    database = Database(url)
    stored = listed(database)
    database.close()
    assert Counter(one.idempotency_key for one in stored) == Counter(f"vote-{number}" for number in range(VOTES))
    assert {one.idempotency_key: one.id for one in stored} == {f"vote-{n}": name for n, name in answered.items()}
    for one in stored:
        assert one.idempotency_key is not None
        number = one.idempotency_key.removeprefix("vote-")
        assert [answer["text"] for answer in one.answers] == [f"good {number}", f"bad {number}"]


def test_the_whole_server_is_killed(url: str, tmp_path: Path) -> None:
    """`python -m benchmarks.reliability.feedback_crashes` kills it more often."""
    settings = {"feedback_database": url, "keep_generations": "forever", "slots": 2, "context": 64}
    seen = feedback_crashes.run(
        lambda: forked_server(tmp_path / "profiles", tmp_path / "log", **settings), kills=1, seed=3, most_answers=40
    )
    assert seen.counts["cut off"] == feedback_crashes.CLIENTS
    assert seen.answered.keys() >= {"pair-1"}
