"""The kinds of jobs. A new kind is an entry here, and a route in `server.api.job_routes` that takes its body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from server.jobs.job import JobResult, JobSettings
from steering_vectors.progress import Progress

Run = Callable[[JobSettings, Progress], JobResult]


@dataclass(frozen=True, slots=True)
class Kind:
    """`run` names a function `run(settings, progress) -> JobResult` as MODULE:FUNCTION, which a child process imports.
    It raises TrimtabError for what a user can mend. `check` names a function of a job's options, which raises
    TrimtabError for those that cannot work; the server calls it before a job is accepted. A kind that `needs_profile`
    works on a version of a profile, which it gets as a file."""

    name: str
    run: str
    check: str | None = None
    needs_profile: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fit", "server.jobs.tasks:fit", check="server.jobs.tasks:fit_settings"),
        Kind(
            "calibrate",
            "server.jobs.tasks:calibrate",
            check="server.jobs.tasks:calibration_settings",
            needs_profile=True,
        ),
        Kind(
            "evaluate", "server.jobs.tasks:evaluate", check="server.jobs.tasks:evaluation_settings", needs_profile=True
        ),
        Kind("refine", "server.jobs.tasks:refine", check="server.jobs.tasks:check_refinement", needs_profile=True),
    )
}


def imported(name: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names."""
    module, _, function = name.partition(":")
    return cast(Callable[..., Any], getattr(import_module(module), function))
