"""A second team of workers exists exactly while other processes want the processors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from steering_vectors.runtime.cpu import spinning
from steering_vectors.runtime.cpu.spinning import SecondTeam, seconds_waited, spinning_unless_shared

pytestmark = pytest.mark.skipif(not spinning.TASKS.exists(), reason="the system does not tell how long threads waited")

TEAM_CODE = """
import torch
from steering_vectors.runtime.cpu.spinning import SecondTeam
from steering_vectors.runtime.cpu.threads import processors
from tests.steering_vectors.runtime.cpu.test_spinning import eventually, tasks

torch.set_num_threads(2)
before = tasks()
team = SecondTeam()
print(eventually(lambda: tasks() == before + processors()))
team.close()
print(eventually(lambda: tasks() == before), torch.get_num_threads())
"""
SHARED_CODE = """
import os, subprocess, sys, threading, time, torch
from steering_vectors.runtime.cpu.spinning import spinning_unless_shared

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])

def shares():
    return any(thread.name == "trimtab-second-team" for thread in threading.enumerate())

try:
    with spinning_unless_shared():
        assert not shares()
        until = time.monotonic() + 60
        while not shares() and time.monotonic() < until:
            sum(range(10_000))
        print("shared" if shares() else "alone")
    print("shared" if shares() else "alone")
finally:
    other.kill()
"""


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 30
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def tasks() -> int:
    return len(list(spinning.TASKS.iterdir()))


def test_a_second_team_lasts_until_it_is_closed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", TEAM_CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True", "2"]


def test_threads_wait_where_others_want_the_processor() -> None:
    assert (seconds_waited() or 0.0) >= 0.0
    done = subprocess.run([sys.executable, "-c", SHARED_CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["shared", "alone"]


def test_the_watch_ends_with_its_last_user() -> None:
    def watches() -> int:
        return sum(thread.name == "trimtab-spinning" for thread in threading.enumerate())

    before = watches()
    with spinning_unless_shared(), spinning_unless_shared():
        assert watches() == 1
    assert watches() == before == 0


def test_a_team_is_made_even_if_it_is_closed_at_once() -> None:
    SecondTeam().close()
    assert not any(thread.name == "trimtab-second-team" for thread in threading.enumerate())
