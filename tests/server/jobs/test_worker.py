"""The worker with kinds of jobs that cost nothing, on both databases: what becomes of jobs, also of those whose process
is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import pytest

from server.jobs import job_queries
from server.jobs.child import LOWEST_PRIORITY
from server.jobs.job_folders import FEEDBACK, LOG
from tests.server.jobs.conftest import Desk, wait
from tests.support.feedback_server import vote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KILLS = 4  # benchmarks.reliability.job_crashes has more


def test_jobs_run_one_after_the_other_at_low_priority(desk: Desk) -> None:
    jobs = [desk.order("count", steps=3, seconds=0.05) for _ in range(3)]
    desk.work()
    desk.work()  # of another server of this machine: they share one place
    wait(lambda: all(desk.state(job) == "succeeded" for job in jobs))
    found = [desk.get(job) for job in jobs]
    assert [one.result for one in found] == [{"steps": 3, "data": None, "profile": "warm", "loss": None}] * 3
    times = sorted((one.started, one.ended) for one in found)
    assert all(ended <= started for (_, ended), (started, _) in pairwise(times))  # type: ignore[operator]
    steps = desk.steps(jobs[0])
    assert [step for step, _, _ in steps] == [0, 1, 2]
    assert {nice for _, _, nice in steps} == {LOWEST_PRIORITY}
    assert found[0].attempts == 1
    log = desk.folders.log(jobs[0])
    assert [line for line in log.splitlines() if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert "count: 3/3" in log


def test_a_job_reports_its_error_and_is_not_tried_again(desk: Desk) -> None:
    refused, broken = desk.order("refuse"), desk.order("break_down")
    desk.work()
    wait(lambda: desk.state(refused) == desk.state(broken) == "failed")
    assert desk.get(refused).error == {"code": "fit_failed", "message": "there is nothing to fit"}
    error = desk.get(broken).error
    assert error is not None
    assert error["code"] == "internal_error"
    assert "ValueError: a fault of the program" in error["message"]
    assert "Traceback" in desk.folders.log(broken)
    assert (desk.get(refused).attempts, desk.get(broken).attempts) == (1, 1)


def test_a_job_whose_process_dies_is_tried_three_times(desk: Desk) -> None:
    job = desk.order("die")
    desk.work()
    wait(lambda: desk.state(job) == "failed")
    found = desk.get(job)
    assert found.attempts == 3
    assert found.error is not None
    assert found.error["code"] == "job_died"
    assert found.error["message"].startswith("the job's process was killed by signal 9, for the 3rd time: ")
    assert desk.folders.log(job).count("-- attempt") == 3


def test_a_running_job_is_cancelled(desk: Desk) -> None:
    job = desk.order("count", steps=2000, seconds=0.05)
    desk.work()
    wait(lambda: len(desk.steps(job)) > 2)
    process = desk.steps(job)[0][1]
    with desk.database.writing() as connection:
        job_queries.cancel(connection, job, time.time())
    assert desk.get(job).cancelling
    wait(lambda: desk.state(job) == "cancelled")
    assert not is_alive(process)
    assert desk.get(job).progress is not None


def test_a_message_that_was_lost_is_sent_again(desk: Desk) -> None:
    job = desk.order("count", send=False)
    desk.work()
    wait(lambda: desk.state(job) == "succeeded")


def test_a_worker_that_is_told_to_end_queues_its_job_again(desk: Desk) -> None:
    job = desk.order("count", steps=40, seconds=0.05)
    worker = desk.work()
    wait(lambda: len(desk.steps(job)) > 2)
    assert worker.stdin is not None
    worker.stdin.close()  # as the end of the server does, also by kill -9
    assert worker.wait(30) == 0
    assert (desk.state(job), desk.get(job).attempts) == ("queued", 0)
    assert not is_alive(desk.steps(job)[0][1])
    desk.work()
    wait(lambda: desk.state(job) == "succeeded")
    assert [step for step, _, _ in desk.steps(job)] == list(range(40))
    assert len({process for _, process, _ in desk.steps(job)}) == 2


def test_a_killed_worker_takes_its_job_along_and_the_next_one_resumes_it(desk: Desk) -> None:
    job = desk.order("count", steps=40, seconds=0.05)
    worker = desk.work()
    wait(lambda: len(desk.steps(job)) > 2)
    worker.kill()
    worker.wait()
    wait(lambda: not is_alive(desk.steps(job)[0][1]))
    assert desk.state(job) == "running"  # nobody could write anything else
    desk.work()
    wait(lambda: desk.state(job) == "succeeded")
    assert [step for step, _, _ in desk.steps(job)] == list(range(40))
    assert desk.get(job).attempts == 2


def test_a_job_of_a_dead_worker_that_was_cancelled_is_cancelled(desk: Desk) -> None:
    job = desk.order("count", steps=40, seconds=0.05)
    worker = desk.work()
    wait(lambda: len(desk.steps(job)) > 2)
    worker.kill()
    with desk.database.writing() as connection:
        job_queries.cancel(connection, job, time.time())
    desk.work()
    wait(lambda: desk.state(job) == "cancelled")


def test_kill_9_at_random_points_loses_no_job_and_publishes_nothing_by_half(desk: Desk) -> None:
    """Ten workers are killed, at random moments of starting, running and writing down."""
    draw = random.Random(11)
    jobs = [desk.order("count", steps=6, seconds=0.02, content=f"profile {number}") for number in range(12)]
    for _ in range(KILLS):
        worker = desk.work()
        time.sleep(draw.uniform(0.3, 2.5))
        worker.kill()
        worker.wait()
    desk.work()
    ended = {"publishing", "failed"}
    wait(lambda: {desk.state(job) for job in jobs} <= ended)
    for job in jobs:
        found = desk.get(job)
        if found.state == "publishing":
            assert [step for step, _, _ in desk.steps(job)] == list(range(6))  # none twice, none left out
            assert found.publication is not None
            assert found.result == {"steps": 6}
        else:
            assert found.error is not None
            assert (found.error["code"], found.attempts) == ("job_died", 3)
    assert Counter(desk.state(job) for job in jobs)["publishing"] >= 10


def test_feedback_is_exported_once_and_removed_at_the_end(desk: Desk) -> None:
    from server.feedback import adding
    from server.feedback.items import Submission, Who

    empty = desk.order("count", data={"feedback": "preference"})
    desk.work()
    wait(lambda: desk.state(empty) == "failed")
    error = desk.get(empty).error
    assert error == {"code": "invalid_data", "message": "the feedback has no preference rows (there is none)"}
    with desk.database.writing() as connection:
        adding.add(connection, [Submission(tuple(vote(number) for number in range(20)), Who(), time.time())])
    job = desk.order("count", steps=40, seconds=0.05, data={"feedback": "preference"})
    file = desk.folders.path(job) / FEEDBACK
    wait(lambda: len(desk.steps(job)) > 2)
    assert file.read_text().count("\n") == 20
    wait(lambda: desk.state(job) == "succeeded")
    assert desk.get(job).result == {"steps": 40, "data": FEEDBACK, "profile": "warm", "loss": None}
    wait(lambda: not file.exists())
    assert (desk.folders.path(job) / LOG).exists()


def is_alive(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def test_a_supervisors_sigterm_to_all_processes_counts_as_no_death(desk: Desk) -> None:
    job = desk.order("count", steps=40, seconds=0.05)
    worker = desk.work()
    wait(lambda: len(desk.steps(job)) > 2)
    for process in (desk.steps(job)[0][1], worker.pid):
        os.kill(process, signal.SIGTERM)
    worker.wait(30)
    assert (desk.state(job), desk.get(job).attempts) == ("queued", 0)
