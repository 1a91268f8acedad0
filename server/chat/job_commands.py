"""`trimtab jobs`: list, show, follow, cancel and delete the jobs of a running server, and print their logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer

from server.chat.administration import LOCAL, ApiKey, AsJson, Url, connected, print_answer

if TYPE_CHECKING:
    from steering_vectors.progress import Progress

FAILED = 2
PREPARING = {"queued": "waiting", "running": "loading the model"}  # stages of jobs that report none yet

jobs = typer.Typer(no_args_is_help=True, help="List, follow and cancel the background jobs of a running server.")

JobId = Annotated[str, typer.Argument(help="The job's id.")]


class StateName(StrEnum):
    queued = "queued"
    running = "running"
    publishing = "publishing"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


@jobs.command("list")
def list_(
    state: Annotated[StateName | None, typer.Option(help="Only jobs in this state.")] = None,
    profile: Annotated[str, typer.Option(help="Only jobs about this profile.")] = "",
    limit: Annotated[int, typer.Option(help="The maximum number of jobs.", min=1, max=1000)] = 100,
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    query = {"limit": limit, **({"state": state.value} if state else {}), **({"profile": profile} if profile else {})}
    with connected(url, api_key) as server:
        answer = server.fetch(f"/jobs?{urlencode(query)}")
    print_answer(answer, json_, *(_line(one) for one in answer.get("jobs", ())))


@jobs.command()
def show(id: JobId, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """Show a job: its state, progress, and result or failure."""
    with connected(url, api_key) as server:
        answer = server.fetch(_path(id))
    lines = [_line(answer)]
    for name in ("created_at", "started_at", "ended_at", "by", "version"):
        lines += [f"{name.replace('_', ' ')}: {answer[name]}"] if name in answer else []
    for name in ("data", "options", "result"):
        lines += [f"{name}: {json.dumps(answer[name], ensure_ascii=False)}"] if answer.get(name) else []
    print_answer(answer, json_, *lines)


@jobs.command()
def follow(id: JobId, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """Show a job's progress until it ends. The exit code is 0 only if it succeeds. With --json, print each event."""
    from server.chat.remote import RemoteError
    from steering_vectors.reports.terminal import progress_on_stderr

    last: dict[str, Any] = {}
    stage = ""
    with connected(url, api_key) as server, progress_on_stderr(quiet=json_) as progress:
        for last in server.events(_path(id, "events")):
            if json_:
                print(json.dumps(last), flush=True)
            elif progress is not None:
                stage = _show(last, stage, progress)
    if last.get("state") not in ("succeeded", "failed", "cancelled"):
        raise RemoteError(f"{url} ended the events before the job did: follow it again")
    if not json_:
        print(_line(last))
    if last["state"] != "succeeded":
        raise typer.Exit(FAILED)


@jobs.command()
def cancel(id: JobId, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """Cancel a job: at once if it waits, within seconds if it runs."""
    with connected(url, api_key) as server:
        answer = server.send("POST", _path(id, "cancel"))
    print_answer(answer, json_, _line(answer))


@jobs.command()
def delete(id: JobId, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """Delete a job that has ended, with its log."""
    with connected(url, api_key) as server:
        answer = server.send("DELETE", _path(id))
    print_answer(answer, json_, f"{id} was deleted")


@jobs.command()
def log(id: JobId, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """Print what a job's process printed."""
    with connected(url, api_key) as server:
        text = server.download(_path(id, "log")).decode(errors="replace")
    if json_:
        print(json.dumps({"id": id, "log": text}))
    else:
        sys.stdout.write(text)


def _path(*parts: str) -> str:
    return "/".join(["/jobs", *(quote(part, safe="") for part in parts)])


def _show(job: Mapping[str, Any], before: str, progress: Progress) -> str:
    """Show an event in the progress bars; returns its stage. `before` is the stage of the last one."""
    found = job.get("progress") if job["state"] != "queued" else None
    stage: str = PREPARING.get(job["state"], before) if found is None else found["stage"]
    if before != stage and before in PREPARING.values():
        progress(before, 1, 1)
    if found is not None:
        progress(stage, found["done"], found["total"], found["detail"])
    elif before != stage:
        progress(stage, 0, 1)
    return stage


def _line(job: Mapping[str, Any]) -> str:
    """A job in one line."""
    parts = [job["id"], job["kind"], job["profile"], "stopping" if job.get("cancelling") else job["state"]]
    if (found := job.get("progress")) is not None and job["state"] == "running":
        parts.append(f"{found['stage']} {found['done']}/{found['total']}")
    if "version" in job:
        parts.append(job["version"][:8])
    if "failure" in job:
        parts.append(job["failure"]["message"])
    return "  ".join(parts)
