"""Background jobs: POST /profiles/{name}/fit, calibrate, evaluate and refine, and the routes under /jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, NotRequired, cast

from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from server.api.dependencies import ReadyDep
from server.api.document import declare, declare_text
from server.api.fields.body import FAIL_FAST, Body, Examples, Short
from server.api.profile_changes import AuthorDep, ConditionsDep
from server.api.profiles import ProfileName
from server.http.answers import about
from server.http.middleware import StrictRoute
from server.http.sse import EventStreamResponse
from server.jobs.job import Job, JobData, JobOrder, Rows, State
from server.jobs.job_service import Jobs
from server.profiles.audit import Author
from server.profiles.directory_changes import Conditions
from steering_vectors.errors import RequestError

MAX_PAIRS = 100_000
MAX_PAGE = 1000
SUBMITTING = (400, 404, 409, 412, 429, 503, 507)
KindName = Literal["fit", "calibrate", "evaluate", "refine"]
EXAMPLE_TIME = "2026-11-30T18:17:32.000+00:00"
EXAMPLE_JOB = "job-1f2e3d4c5b6a798811223344"
ABOUT_DATA = "An embedded set such as `demo:warm`, a public one as `hf:NAME[:split]`, or a file in `--jobs-data`."


class FeedbackData(Body):
    """Feedback that the server has stored, as preference data."""

    rows: Rows = Field(
        "preference", description="`preference` is pairs and edits, `unpaired` is thumbs and ratings, as exports have."
    )
    profile: Short | None = Field(
        None, description="Only feedback on answers that this profile steered: NAME or NAME#SHA8.", examples=["warm"]
    )


class JobBody(Body):
    """The preference data of a job: one of `data`, `pairs` and `feedback`."""

    not_options: ClassVar[frozenset[str]] = frozenset({"data", "pairs", "feedback"})

    data: Short | None = Field(None, min_length=1, description=ABOUT_DATA, examples=["demo:warm"])
    pairs: Annotated[list[dict[str, Any]], FAIL_FAST] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PAIRS,
        description="The rows themselves, in the formats of `trimtab fit`.",
        examples=[[{"prompt": "Bread is", "chosen": " good.", "rejected": " hard."}]],
    )
    feedback: FeedbackData | None = Field(None, description="Feedback that this server has stored.")
    columns: dict[Short, Short] | None = Field(
        None, max_length=16, description="Renames columns.", examples=[{"prompt": "question"}]
    )
    skip_bad_rows: bool = Field(False, description="Skip unusable rows instead of failing.")
    skip_long_rows: bool = Field(False, description="Skip rows longer than the model's context instead of failing.")
    seed: int = Field(0, ge=0, lt=2**63, description="The random seed. Equal seeds give equal results.")

    def order(self, kind: KindName, profile: str, conditions: Conditions | None) -> JobOrder:
        """Raises RequestError unless there is exactly one source of data."""
        given = [name for name in ("data", "pairs", "feedback") if getattr(self, name) is not None]
        if len(given) != 1:
            problem = "is missing" if not given else f"has {len(given)} sources: {', '.join(given)}"
            raise RequestError(f"the preference data {problem}: send one of data, pairs and feedback", param="data")
        feedback = self.feedback
        data = JobData(
            self.data,
            None if self.pairs is None else tuple(self.pairs),
            None if feedback is None else feedback.rows,
            None if feedback is None else feedback.profile,
        )
        options = self.model_dump(exclude=set(self.not_options), exclude_none=True, exclude_unset=True)
        if conditions is None:
            return JobOrder(kind, profile, options, data)
        return JobOrder(kind, profile, options, data, conditions.if_match, conditions.if_none_match)


class CalibrationFields(JobBody):
    """How the unit and the safe range are set."""

    kl_budget: float = Field(0.1, description="KL that strength 1 costs, in nats per token.")
    text_tokens: int = Field(
        160, le=4096, description="The safe range is checked on texts of so many tokens; 0 leaves the check out."
    )
    text_count: int = Field(16, le=256, description="Number of these texts at each strength.")


class FitBody(CalibrationFields):
    """The body of POST /profiles/{name}/fit. Fields are flags of `trimtab fit`."""

    examples: ClassVar[Examples] = (
        {"data": "demo:warm", "description": "kind and encouraging"},
        {"feedback": {"rows": "preference"}, "method": "pca"},
    )

    method: Short = Field("mean-diff", description="The method; `trimtab methods` lists them.")
    options: dict[Short, Short | float | int | bool] | None = Field(
        None, max_length=32, description="Options of the method."
    )
    layers: Short = Field("auto", description="auto, 12, 10-20 (both ends included) or 3,5,7.")
    layering: Literal["independent", "incremental"] = Field(
        "independent", description="How the directions of several blocks combine."
    )
    keep_endings: bool = Field(False, description="Remove from directions what makes texts end sooner or later.")
    tokens: Literal["response", "last"] = Field(
        "response", description="Read the mean over the `response` tokens, or the `last` token only."
    )
    heldout_fraction: float = Field(0.2, gt=0, lt=1, description="Share of the rows that is not trained on.")
    calibrate: bool = Field(True, description="Whether to set the unit and the safe range; else the unit is 1.")
    description: Short = Field("", description="A sentence to store in the profile.")


class CalibrateBody(CalibrationFields):
    """The body of POST /profiles/{name}/calibrate. Fields are flags of `trimtab calibrate`."""

    examples: ClassVar[Examples] = ({"data": "demo:warm", "kl_budget": 0.2},)

    perplexity_bound: float = Field(
        3.0, description="The safe range ends where perplexity exceeds this many times the unsteered one."
    )


class EvaluateBody(JobBody):
    """The body of POST /profiles/{name}/evaluate. Fields are flags of `trimtab evaluate preferences`."""

    examples: ClassVar[Examples] = ({"data": "demo:warm", "strengths": [-1, 0, 1], "randoms": 3},)

    strengths: Annotated[list[float], FAIL_FAST] | None = Field(
        None,
        max_length=32,
        description="Strengths to measure, 0 and two others at least; by default −1 to 1 in halves.",
    )
    rows: int = Field(256, ge=8, le=100_000, description="The maximum number of held-out rows.")
    randoms: int = Field(10, ge=0, le=1000, description="The number of random directions to compare with.")
    reward_samples: int = Field(
        64, ge=0, le=4096, description="Texts per prompt that show the optimum of reward against KL; 0 leaves it out."
    )


class RefineBody(Body):
    """The body of POST /profiles/{name}/refine. Fields are flags of `trimtab refine`."""

    examples: ClassVar[Examples] = ({"data": "demo:warm"}, {"vote_weight": 1, "canary_share": 0.2})

    data: Short | None = Field(
        None, min_length=1, description=f"The base data; without it, votes alone. {ABOUT_DATA}", examples=["demo:warm"]
    )
    columns: dict[Short, Short] | None = Field(
        None, max_length=16, description="Renames columns of the base data.", examples=[{"prompt": "question"}]
    )
    skip_bad_rows: bool = Field(False, description="Skip unusable base rows instead of failing.")
    every_vote: bool = Field(False, description="Take votes on other profiles' answers as well.")
    max_user_votes: float = Field(200.0, description="All votes of one user together count at most as so many.")
    vote_weight: float = Field(
        0.0,
        description="How much a vote counts in the fit, compared with a base row; 0 lets all votes together count "
        "three times as much as all base rows.",
    )
    heldout_fraction: float = Field(0.4, gt=0, lt=1, description="Share of the prompts that is in no fit.")
    method: Short = Field("mean-diff", description="The method; `trimtab methods` lists them.")
    options: dict[Short, Short | float | int | bool] | None = Field(
        None, max_length=32, description="Options of the method."
    )
    layers: Short = Field("auto", description="auto, 12, 10-20 (both ends included) or 3,5,7.")
    text_tokens: int = Field(
        160, le=4096, description="The safe range is checked on texts of so many tokens; 0 leaves the check out."
    )
    text_count: int = Field(16, le=256, description="Number of these texts at each strength.")
    confidence: float = Field(0.95, description="Of the interval of the gain, which must lie above 0.")
    min_prompts: int = Field(8, description="Held-out prompts with votes that are needed.")
    max_kl_ratio: float = Field(1.25, description="KL per token, as a factor of the served version's.")
    max_perplexity_ratio: float = Field(
        1.25, description="Perplexity of steered texts, as a factor of the served version's."
    )
    max_trust_harm: float = Field(0.05, description="By how much the main figure of a trust vertical may become worse.")
    trust: Annotated[list[Literal["privacy"]], FAIL_FAST] | None = Field(
        None, max_length=1, description="Verticals of the trust suite; by default privacy, which needs no data."
    )
    trust_rows: int = Field(64, le=4096, description="The maximum number of rows per vertical.")
    strength: float = Field(1.0, description="The strength at which both versions are compared.")
    canary_share: float = Field(
        0.1, description="The share of the requests that the new version gets at first; 0 promotes it at once."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="The random seed. Equal seeds give equal results.")

    def order(self, profile: str) -> JobOrder:
        options = self.model_dump(exclude={"data"}, exclude_none=True, exclude_unset=True)
        return JobOrder("refine", profile, options, None if self.data is None else JobData(self.data))


class JobProgressAnswer(TypedDict):
    """How far a job has come."""

    stage: Annotated[str, about("What is being done now.", "calibrate")]
    done: Annotated[int, about("How much of the stage is done.", 3)]
    total: Annotated[int, about("How much there is to do.", 12)]
    detail: Annotated[str, about("What there is to say of it.", "")]


class JobFailure(TypedDict):
    """Why a job failed."""

    code: Annotated[str, about("A stable identifier for programs.", "invalid_data")]
    message: Annotated[str, about("What is wrong and how to fix it, for people.")]


class JobAnswer(TypedDict):
    """A job."""

    id: Annotated[str, about("Its id.", EXAMPLE_JOB)]
    kind: Annotated[KindName, about("What it does.", "fit")]
    profile: Annotated[str, about("The profile that it is about.", "warm")]
    state: Annotated[
        State,
        about(
            "`queued`, `running`, `publishing` (its profile is made, and about to be served), and in the end "
            "`succeeded`, `failed` or `cancelled`.",
            "running",
        ),
    ]
    created_at: Annotated[str, about("When it was asked for.", EXAMPLE_TIME)]
    attempts: Annotated[int, about("How often it has begun. A job whose process dies begins again, twice.", 1)]
    options: Annotated[dict[str, Any], about("The fields of the request that were sent.", {})]
    data: Annotated[dict[str, Any], about("Where its data comes from, without the data.", {"source": "demo:warm"})]
    started_at: NotRequired[Annotated[str, about("When its latest attempt began.", EXAMPLE_TIME)]]
    ended_at: NotRequired[Annotated[str, about("When it ended.")]]
    by: NotRequired[Annotated[str, about("The name of the key, or the address, that asked for it.", "127.0.0.1")]]
    cancelling: NotRequired[Annotated[Literal[True], about("Present if it runs and is to be stopped.")]]
    progress: NotRequired[Annotated[JobProgressAnswer, about("How far it has come, of a job that has begun.")]]
    version: NotRequired[Annotated[str, about("The version that it published, of one that succeeded.")]]
    result: NotRequired[
        Annotated[
            dict[str, Any],
            about(
                "What it found, of one that succeeded: the profile's summary, or what `trimtab evaluate preferences "
                "--json` or `trimtab refine --json` prints."
            ),
        ]
    ]
    failure: NotRequired[Annotated[JobFailure, about("Why it failed, of one that did.")]]


class JobPage(TypedDict):
    """A page of GET /jobs."""

    jobs: Annotated[list[JobAnswer], about("The newest first, without their results.")]
    next: Annotated[str | None, about("The `before` of the next page; null if this is the last one.")]


class DeletedJob(TypedDict):
    """The answer to DELETE /jobs/{id}."""

    id: Annotated[str, about("The job that was deleted.", EXAMPLE_JOB)]


class JobQuery(BaseModel):
    """Which page of which jobs."""

    model_config = ConfigDict(extra="forbid")

    state: State | None = Field(None, description="Only jobs in this state.")
    kind: KindName | None = Field(None, description="Only this kind.")
    profile: str | None = Field(None, max_length=64, description="Only about this profile.", examples=["warm"])
    before: int | None = Field(None, ge=1, lt=2**63, description="The `next` of the page before.")
    limit: int = Field(100, ge=1, le=MAX_PAGE, description="The size of a page.")


router = APIRouter(tags=["jobs"], route_class=StrictRoute)

JobId = Annotated[str, Path(description="The job's `id`.", examples=[EXAMPLE_JOB])]


async def _jobs(service: ReadyDep) -> Jobs:
    return service.jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]


@router.post("/profiles/{name}/fit", summary="Fit a profile", **declare(JobAnswer, *SUBMITTING, status=201))
async def fit(
    name: ProfileName, body: FitBody, jobs: JobsDep, conditions: ConditionsDep, author: AuthorDep, response: Response
) -> JobAnswer:
    """Queue a job that fits a profile to preference data on the served model, as `trimtab fit` does, and publishes it
    as an upload would: the profile of this name is replaced, and its version is kept. `if-match` and `if-none-match`
    are checked now, and again when the profile is published. Needs the scope `admin`."""
    return await _submit(jobs, body.order("fit", name, conditions), author, response)


@router.post("/profiles/{name}/calibrate", summary="Calibrate a profile", **declare(JobAnswer, *SUBMITTING, status=201))
async def calibrate(
    name: ProfileName,
    body: CalibrateBody,
    jobs: JobsDep,
    conditions: ConditionsDep,
    author: AuthorDep,
    response: Response,
) -> JobAnswer:
    """Queue a job that sets the unit and the safe range of the current version again, and publishes the result. If the
    profile is changed meanwhile, the job fails and changes nothing. Needs the scope `admin`."""
    return await _submit(jobs, body.order("calibrate", name, conditions), author, response)


@router.post("/profiles/{name}/evaluate", summary="Evaluate a profile", **declare(JobAnswer, *SUBMITTING, status=201))
async def evaluate(
    name: ProfileName, body: EvaluateBody, jobs: JobsDep, author: AuthorDep, response: Response
) -> JobAnswer:
    """Queue a job that measures the current version on held-out preferences, with its costs and controls. The job's
    `result` has the figures. Needs the scope `admin`."""
    return await _submit(jobs, body.order("evaluate", name, None), author, response)


@router.post("/profiles/{name}/refine", summary="Refine a profile", **declare(JobAnswer, *SUBMITTING, status=201))
async def refine(
    name: ProfileName, body: RefineBody, jobs: JobsDep, author: AuthorDep, response: Response
) -> JobAnswer:
    """Queue a job that fits a new version to base data and the feedback that this server has stored, as `trimtab
    refine` does. If it passes every gate it is tried as a canary, or promoted at once. The job's `result` says what
    came of it, and so does the audit log. Needs the scope `admin`."""
    return await _submit(jobs, body.order(name), author, response)


@router.get("/jobs", summary="List jobs", **declare(JobPage, 400, 404, 503))
async def listed(query: Annotated[JobQuery, Query()], jobs: JobsDep) -> JobPage:
    """List jobs, the newest first. Needs the scope `admin`, as all routes of jobs."""
    found = await jobs.page(
        state=query.state, kind=query.kind, profile=query.profile, before=query.before, limit=query.limit + 1
    )
    shown = found[: query.limit]
    more = len(found) > query.limit
    return {"jobs": [_answer(one, brief=True) for one in shown], "next": str(shown[-1].seq) if more else None}


@router.get("/jobs/{id}", summary="Show a job", **declare(JobAnswer, 404, 503))
async def show(id: JobId, jobs: JobsDep) -> JobAnswer:
    """Show a job: its state, progress, and result or failure."""
    return _answer(await jobs.get(id))


@router.get("/jobs/{id}/events", summary="Follow a job", **declare(JobAnswer, 404, 503, stream=JobAnswer))
async def events(id: JobId, jobs: JobsDep) -> Response:
    """Stream the job as server-sent events: now, whenever it has changed, and at least every 15 seconds. The stream
    ends with the job. A server that shuts down sends an error as the last event; the job is queued again."""
    await jobs.get(id)

    async def stream() -> AsyncIterator[Mapping[str, Any]]:
        async for one in jobs.follow(id):
            yield _answer(one)

    return EventStreamResponse(stream(), close=_nothing)


@router.get(
    "/jobs/{id}/log",
    summary="Show a job's log",
    response_class=Response,
    **declare_text("capture: 4/4, 0:01 so far\n", 404, 503),
)
async def log(id: JobId, jobs: JobsDep) -> PlainTextResponse:
    """Show what the job's process printed: its stages, notes about the data, and the details of errors. Of a long log
    the last MiB."""
    return PlainTextResponse(await jobs.log(id))


@router.post("/jobs/{id}/cancel", summary="Cancel a job", **declare(JobAnswer, 404, 409, 503))
async def cancel(id: JobId, jobs: JobsDep) -> JobAnswer:
    """Cancel a job. One that is queued is cancelled at once. One that runs is stopped within seconds: the answer has
    `cancelling`. One that has ended is a 409."""
    return _answer(await jobs.cancel(id))


@router.delete("/jobs/{id}", summary="Delete a job", **declare(DeletedJob, 404, 409, 503))
async def delete(id: JobId, jobs: JobsDep) -> DeletedJob:
    """Delete a job that has ended, with its log. Profiles that it published stay. One that has not ended is a 409."""
    return {"id": (await jobs.delete(id)).id}


async def _submit(jobs: Jobs, order: JobOrder, author: Author, response: Response) -> JobAnswer:
    job = await jobs.submit(order, author)
    response.headers["location"] = f"/jobs/{job.id}"
    return _answer(job)


async def _nothing() -> None: ...


def _answer(job: Job, *, brief: bool = False) -> JobAnswer:
    found: dict[str, Any] = {
        "id": job.id,
        "kind": job.kind,
        "profile": job.profile,
        "state": job.state,
        "created_at": _time(job.created),
        "attempts": job.attempts,
        "options": dict(job.options),
        "data": {name: value for name, value in job.data.items() if value is not None},
    }
    more: dict[str, Any] = {
        "started_at": None if job.started is None else _time(job.started),
        "ended_at": None if job.ended is None else _time(job.ended),
        "by": job.author.shown,
        "cancelling": (job.cancelling and job.state == "running") or None,
        "progress": job.progress,
        "version": job.publication.version if job.publication is not None and job.state == "succeeded" else None,
        "result": None if brief or job.state != "succeeded" else job.result,
        "failure": job.error,  # "error" is what a request that failed has
    }
    return cast(JobAnswer, found | {name: value for name, value in more.items() if value is not None})


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
