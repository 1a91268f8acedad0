"""A worker that knows kinds of jobs that cost nothing: `python -m tests.support.job_worker`."""

from __future__ import annotations

from server.jobs import worker
from server.jobs.kinds import KINDS, Kind

NAMES = ("count", "refuse", "break_down", "die")

if __name__ == "__main__":
    KINDS.update({name: Kind(name, f"tests.support.job_functions:{name}") for name in NAMES})
    worker.main()
