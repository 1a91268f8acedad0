"""Whether jobs survive `kill -9`: none is lost, none is published twice, and no profile is there by half.

    python -m benchmarks.reliability.job_crashes [--kills 20] [--database postgresql://…] [--seed 0]

`trimtab serve --jobs` runs on the demo model and fits small profiles, each under a name of its own. At random moments
the server, its worker, or the process of a job is killed; a killed server is started again. A new job is asked for
whenever fewer than two have not ended. At the end every job must have succeeded, with one version and one line in the
audit log, or failed because its process died three times. It fails if one has not.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common.serving import Server, serving

PAIRS = [
    {"prompt": f"How do I bake bread number {n}?", "chosen": f"Gladly! Mix {n}.", "rejected": f"No. Buy {n}."}
    for n in range(24)
]
BODY = {"pairs": PAIRS, "layers": "4", "text_tokens": 0}
LONGEST_SECONDS = 30.0  # until a kill
AT_ONCE = 2  # jobs that wait or run
END_SECONDS = 900.0
ENDED = ("succeeded", "failed", "cancelled")


class Killer:
    """Kills processes of one server after the other. `asked` are the jobs that were answered."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.asked: dict[str, str] = {}  # profile by job
        self.kills: Counter[str] = Counter()

    def kill_once(self, server: Server) -> bool:
        """Ask for jobs, and kill something a moment later. Whether that was the server."""
        self._ask(server)
        time.sleep(self._draw.uniform(0, LONGEST_SECONDS))
        what = self._draw.choice(("server", "worker", "job"))
        found = {"server": [server.pid], "worker": children(server.pid, "server.jobs.worker")}
        found["job"] = [one for worker in found["worker"] for one in children(worker, "server.jobs.child")]
        if not found[what]:
            what = "server"
        os.kill(found[what][0], signal.SIGKILL)
        self.kills[what] += 1
        return what == "server"

    def _ask(self, server: Server) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            active = [one for one in client.get("/jobs").json()["jobs"] if one["state"] not in ENDED]
            for _ in range(AT_ONCE - len(active)):
                profile = f"p{len(self.asked)}"
                answer = client.post(f"/profiles/{profile}/fit", json=BODY)
                self.asked[answer.json()["id"]] = profile

    def finish(self, server: Server) -> tuple[Counter[str], list[str]]:
        """Let the jobs end; how they did, and what is wrong."""
        last = time.monotonic() + END_SECONDS
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while time.monotonic() < last:
                jobs: list[dict[str, Any]] = client.get("/jobs", params={"limit": 1000}).json()["jobs"]
                if all(one["state"] in ENDED for one in jobs):
                    break
                time.sleep(0.5)
            log = client.get("/audit", params={"limit": 1000}).json()["changes"]
            served = {one["name"]: one.get("version") for one in client.get("/profiles").json()["profiles"]}
        known = {one["id"]: one for one in jobs}
        problems = [f"{job} was lost" for job in self.asked if job not in known]
        for job, profile in self.asked.items():
            problems += _problems(known.get(job, {}), profile, log, served)
        return Counter(one["state"] for one in jobs), problems


def children(process: int, module: str) -> list[int]:
    """The children of a process that run a module."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
    return found


def main(
    kills: Annotated[int, typer.Option(min=1)] = 20,
    database: Annotated[str, typer.Option(help="A file or a postgresql:// URL; a new file by default.")] = "",
    seed: int = 0,
) -> None:
    killer = Killer(seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        url = database or str(folder / "feedback.db")
        os.environ["TMPDIR"] = made  # where a machine's places for jobs are
        done = 0
        while done < kills:
            with suppress(ProcessLookupError), _serving(folder, url) as server:
                is_dead = False
                while done < kills and not is_dead:
                    is_dead = killer.kill_once(server)
                    done += 1
        with _serving(folder, url) as server:
            states, problems = killer.finish(server)
        halves = [str(path) for path in (folder / "profiles").rglob("*.part")]
        halves += [str(path) for path in (folder / "profiles" / ".trimtab" / "uploads").glob("*")]
    print(f"{done} kills: {dict(killer.kills)}; {len(killer.asked)} jobs: {dict(states)}")
    for problem in (*problems, *(f"left behind: {path}" for path in halves)):
        print(f"WRONG: {problem}")
    if problems or halves:
        raise typer.Exit(1)


def _serving(folder: Path, url: str) -> Any:
    options = {"feedback_database": url, "jobs": "true", "slots": 4, "drain_seconds": 1}
    return serving("demo", folder / "profiles", log=folder / "log.txt", **options)


def _problems(job: dict[str, Any], profile: str, log: list[dict[str, Any]], served: dict[str, str | None]) -> list[str]:
    """What is wrong with a job that has ended."""
    if not job:
        return []
    uploads = {one["to_version"] for one in log if one["profile"] == profile and one["action"] == "upload"}
    if job["state"] == "failed":
        died = job["failure"]["code"] == "job_died" and not uploads
        return [] if died else [f"{job['id']} failed: {job['failure']}, with {len(uploads)} versions"]
    if job["state"] != "succeeded":
        return [f"{job['id']} is {job['state']}"]
    if uploads != {job["version"]} or served.get(profile) != job["version"]:
        return [f"{job['id']} made {job['version'][:8]}: uploads {uploads}, served {served.get(profile)}"]
    return []


if __name__ == "__main__":
    typer.run(main)
