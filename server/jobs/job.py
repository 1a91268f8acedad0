"""What a job is: its states, what it is asked to do, what it reports, and the errors of requests about jobs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from server.profiles.audit import Author
from steering_vectors.errors import RequestError, TrimtabError

NO_JOBS = "this server runs no jobs: start it with --jobs"
MAX_ATTEMPTS = 3  # whose process died; an error that the work itself reports is not tried again

State = Literal["queued", "running", "publishing", "succeeded", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
ACTIVE: tuple[State, ...] = ("queued", "running", "publishing")

Rows = Literal["preference", "unpaired"]


class JobsOff(RequestError):
    code = "jobs_off"
    status: ClassVar[int] = 404


class UnknownJob(RequestError):
    code = "job_not_found"
    status: ClassVar[int] = 404


class JobsUnavailable(RequestError):
    code = "jobs_unavailable"
    status: ClassVar[int] = 503


class JobProgress(TypedDict):
    """How far a job has come: the stage, how much of it is done, and what there is to say of it."""

    stage: str
    done: int
    total: int
    detail: str


class Failure(TypedDict):
    """Why a job failed."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class JobData:
    """Where the preference data of a job comes from: a `source` that `load_pairs` reads, `pairs` that came with the
    request, or the `feedback` that the server keeps, by the rows to make of it and the profile that it is about."""

    source: str | None = None
    pairs: tuple[Mapping[str, Any], ...] | None = None
    feedback: Rows | None = None
    feedback_profile: str | None = None


@dataclass(frozen=True, slots=True)
class JobOrder:
    """A job that is asked for. `options` are the fields of the request that its work reads. The conditions are the
    headers If-Match and If-None-Match, for the publication of what it makes."""

    kind: str
    profile: str
    options: Mapping[str, Any]
    data: JobData | None = None
    if_match: str | None = None
    if_none_match: str | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """The profile file that a job has made, and the version that was current when its publication began. Written
    before anything is published, so that a server that was killed knows whether it had been."""

    version: str
    before: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored. Times are in seconds since 1970."""

    seq: int
    id: str
    kind: str
    profile: str
    state: State
    options: Mapping[str, Any]
    data: Mapping[str, Any]  # without its pairs, which are in the job's folder
    conditions: Mapping[str, str]
    author: Author
    created: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    cancelling: bool = False
    progress: JobProgress | None = None
    publication: Publication | None = None
    result: Mapping[str, Any] | None = None
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """How a job loads the model that the server serves. Its fields are arguments of `load_model`."""

    model: str
    dtype: str = "auto"
    device: str = "cpu"
    adapter: str | None = None
    chat_template: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What the function of a kind gets, in the child process.

    - `profile`: the name of the profile that the job is about. `base`: the file of its version at the time of the
      request, for kinds that work on one.
    - `options`: the fields of the request.
    - `data`: what `load_pairs` reads: a path relative to `folder`, or an embedded or public set. None without data.
    - `folder`: the job's own. What is written there outlives a crash, and is there when the job begins again.
    - `database`: the URL of the feedback database. `profiles`: the profile directory, and `profile_versions`,
      `profile_quota_bytes` and `audit_log` the server's settings for it. The server publishes the file of a result, so
      a function need not write there. `author`: who asks for the job, in the audit log.
    """

    profile: str
    options: Mapping[str, Any]
    folder: Path
    model: ServedModel
    data: str | None = None
    base: Path | None = None
    database: str = ""
    profiles: Path = Path("profiles")
    profile_versions: int = 5
    profile_quota_bytes: int = 2**30
    audit_log: Path | None = None
    author: Author = field(default_factory=Author)
    allow_model_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job has found: figures that can be written as JSON, and a profile file in its folder, to be published
    under the name of the job's profile. Without a file nothing is published."""

    figures: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None


def new_id() -> str:
    return f"job-{secrets.token_hex(12)}"


def failure_of(error: TrimtabError) -> Failure:
    return {"code": error.code, "message": error.message}
