"""Functions of jobs that cost nothing. `tests.support.job_worker` is a worker that knows them as kinds.

They note what they do in their folder, so that a test can see how often a job has begun and what it found again.
"""

from __future__ import annotations

import os
import signal
import time

from server.jobs.job import JobResult, JobSettings
from steering_vectors.errors import FitError
from steering_vectors.progress import Progress

STEPS = "steps.txt"


def count(settings: JobSettings, progress: Progress) -> JobResult:
    """Count to `steps`, `seconds` apart, from where an attempt before was killed. Makes a file if it has `content`."""
    path, total = settings.folder / STEPS, int(settings.options.get("steps", 5))
    with path.open("a+", encoding="ascii") as file:
        file.seek(0)
        begun = len(file.readlines())
        for step in range(begun, total):
            print(f"step {step}", flush=True)
            file.write(f"{step} {os.getpid()} {os.nice(0)}\n")
            file.flush()
            progress("count", step + 1, total)
            time.sleep(float(settings.options.get("seconds", 0.0)))
    if "content" not in settings.options:
        loss = float("nan")  # as a measurement may come out
        return JobResult({"steps": total, "data": settings.data, "profile": settings.profile, "loss": loss})
    made = settings.folder / f"{settings.profile}.safetensors"
    made.write_text(str(settings.options["content"]), encoding="ascii")
    return JobResult({"steps": total}, made)


def refuse(settings: JobSettings, progress: Progress) -> JobResult:
    raise FitError("there is nothing to fit")


def break_down(settings: JobSettings, progress: Progress) -> JobResult:
    raise ValueError("a fault of the program")


def die(settings: JobSettings, progress: Progress) -> JobResult:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
