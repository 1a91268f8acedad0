"""POST and GET /feedback, and DELETE /feedback/users/{id}: what people say about answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, NotRequired, cast

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from server.access.callers import Caller
from server.access.gate import CALLER
from server.api.dependencies import CallerDep, ReadyDep, ServiceDep
from server.api.document import declare
from server.api.fields.body import Body
from server.api.fields.prompts import MessageBody, Messages, messages_of
from server.feedback.items import (
    Answer,
    Better,
    FeedbackError,
    Filter,
    Item,
    Kind,
    SignalName,
    Stored,
    Subject,
    Thumb,
    user_id,
)
from server.feedback.keeping import who
from server.feedback.store import FeedbackStore
from server.http.answers import about
from server.http.direct import valid, valid_body
from server.http.error_responses import status_of
from server.http.middleware import StrictRequest, StrictRoute
from server.state import Service
from steering_vectors.errors import TrimtabError

MAX_TEXT = 2**17  # characters of a prompt or an answer
MAX_COMMENT = 2**14  # characters
MAX_BATCH = 1000
MAX_PAGE = 1000
MAX_USER = 256  # characters
MAX_KEY = 255  # characters of an idempotency key
MAX_DWELL_SECONDS = 30 * 86400.0
PLAIN = r"^[^\x00-\x1f\x7f]+$"
PROFILE = r"^[a-z0-9][a-z0-9._-]{0,63}(#[0-9a-f]{1,64})?$"

EXAMPLE_TIME = "2026-11-21T01:17:32.000+00:00"
EXAMPLES: Sequence[Mapping[str, Any]] = (
    {"kind": "edit", "prompt": "Bread is", "answer": {"text": "hard."}, "corrected": "good.", "user": "u-18"},
    {"kind": "pair", "a": {"generation": "gen-c9f0f895"}, "b": {"generation": "gen-45c48cce"}, "better": "a"},
    {"kind": "thumb", "answer": {"generation": "chatcmpl-8f14e45f", "choice": 0}, "thumb": "up"},
)

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
UserId = Annotated[str, Field(max_length=MAX_USER, pattern=PLAIN)]
IdempotencyKey = Annotated[str, Field(max_length=MAX_KEY, pattern=PLAIN)]


class AnswerBody(Body):
    """An answer: a generation that the server keeps, or a text."""

    generation: Annotated[str, Field(max_length=128, pattern=PLAIN)] | None = Field(
        None,
        description="The `generation_id` of a choice, the `id` of POST /generate, or the `id` of an answer on /v1.",
        examples=["gen-c9f0f895"],
    )
    choice: int | None = Field(
        None, ge=0, description="The choice of an answer on /v1; needed if it has several.", examples=[0]
    )
    text: Text | None = Field(None, description="The text itself. Exclusive with `generation`.")

    def subject(self, param: str) -> Subject:
        """Raises FeedbackError unless there is exactly one of generation and text."""
        if (self.generation is None) == (self.text is None):
            raise FeedbackError(f"{param}: send either generation or text", param=param)
        if self.choice is not None and self.generation is None:
            raise FeedbackError(f"{param}.choice is for generations: leave it out", param=f"{param}.choice")
        return Subject(param, self.generation, self.choice, self.text)


class GivenBody(Body):
    """The fields of all feedback."""

    said: ClassVar[tuple[str, ...]]
    answers: ClassVar[tuple[str, ...]] = ("answer",)

    prompt: Text | Messages | None = Field(
        None, description="The prompt of answers that are texts, a text or messages. Generations have their own."
    )
    user: UserId | None = Field(
        None, description="Whose feedback this is, so that it can be deleted.", examples=["u-17"]
    )
    idempotency_key: IdempotencyKey | None = Field(
        None,
        description="Stores this once however often it is sent; also the header `Idempotency-Key`.",
        examples=["5f0c…"],
    )

    def item(self, kind: Kind, where: str, key: str | None) -> Item:
        """Raises FeedbackError that names a field."""
        bodies: list[tuple[str, AnswerBody]] = [(f"{where}{name}", getattr(self, name)) for name in self.answers]
        subjects = tuple(body.subject(param) for param, body in bodies)
        texts = [subject for subject in subjects if subject.text is not None]
        param = f"{where}prompt"
        if texts and self.prompt is None:
            raise FeedbackError(f"{param} is missing: a text needs the prompt that it answers", param=param)
        if self.prompt is not None and len(texts) < len(subjects):
            raise FeedbackError(f"{param} is for texts: a generation has its own, leave it out", param=param)
        value = {name: given for name in self.said if (given := getattr(self, name)) is not None}
        return Item(kind, value, subjects, _prompt(self.prompt), user_id(self.user), key, where)


class PairBody(GivenBody):
    """Which of two answers to one prompt is better."""

    said = ("better",)
    answers = ("a", "b")

    kind: Literal["pair"] = Field(description="Says which kind of feedback this is.")
    a: AnswerBody = Field(description="One answer.")
    b: AnswerBody = Field(description="Another one, to the same prompt.")
    better: Better = Field(description="The better one, or `tie`.")


class ThumbBody(GivenBody):
    """A thumb up or down."""

    said = ("thumb",)

    kind: Literal["thumb"] = Field(description="Says which kind of feedback this is.")
    answer: AnswerBody = Field(description="The answer.")
    thumb: Thumb = Field(description="The thumb.")


class RatingBody(GivenBody):
    """A number on a scale."""

    said = ("rating", "min", "max")

    kind: Literal["rating"] = Field(description="Says which kind of feedback this is.")
    answer: AnswerBody = Field(description="The answer.")
    rating: float = Field(description="The rating, on the scale from `min` to `max`.", examples=[4])
    min: float = Field(1.0, ge=-1e6, le=1e6, description="The lowest rating.")
    max: float = Field(5.0, ge=-1e6, le=1e6, description="The highest and best rating.")

    def item(self, kind: Kind, where: str, key: str | None) -> Item:
        if self.min >= self.max:
            raise FeedbackError(f"{where}min must be below max", param=f"{where}min")
        if not self.min <= self.rating <= self.max:
            message = f"{where}rating must lie on its scale, {self.min:g} to {self.max:g}, not {self.rating:g}"
            raise FeedbackError(message, param=f"{where}rating")
        return super().item(kind, where, key)


class EditBody(GivenBody):
    """A corrected text, which is better than the original."""

    said = ("corrected",)

    kind: Literal["edit"] = Field(description="Says which kind of feedback this is.")
    answer: AnswerBody = Field(description="The original.")
    corrected: Text = Field(description="The corrected text.")


class SignalBody(GivenBody):
    """What somebody did with an answer, without a judgement."""

    said = ("signal", "seconds")

    kind: Literal["signal"] = Field(description="Says which kind of feedback this is.")
    answer: AnswerBody = Field(description="The answer.")
    signal: SignalName = Field(description="What happened; `dwell_seconds` needs `seconds`.")
    seconds: float | None = Field(
        None, ge=0, le=MAX_DWELL_SECONDS, description="How long the answer was looked at.", examples=[12.5]
    )

    def item(self, kind: Kind, where: str, key: str | None) -> Item:
        if (self.signal == "dwell_seconds") != (self.seconds is not None):
            message = f"{where}seconds belongs to the signal dwell_seconds: send both or neither"
            raise FeedbackError(message, param=f"{where}seconds")
        return super().item(kind, where, key)


class CommentBody(GivenBody):
    """What somebody says about an answer, in their own words."""

    said = ("comment",)

    kind: Literal["comment"] = Field(description="Says which kind of feedback this is.")
    answer: AnswerBody = Field(description="The answer.")
    comment: str = Field(min_length=1, max_length=MAX_COMMENT, description="The words.")


Given = Annotated[PairBody | ThumbBody | RatingBody | EditBody | SignalBody | CommentBody, Discriminator("kind")]


class OneOrMany:
    """Annotates a list in whose place a single entry may be sent, for the OpenAPI document."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        return {"anyOf": [found["items"], found], "examples": list(EXAMPLES)}


def _one_or_many(value: Any, validate: Any) -> Any:
    """A list, or one object. Errors name fields without the kind, which pydantic puts before them."""
    single = not isinstance(value, list)
    try:
        return validate([value] if single else value)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            error.title, [_named(one, single) for one in error.errors()]
        ) from None


def _named(error: Mapping[str, Any], single: bool) -> InitErrorDetails:
    place, *rest = error["loc"] or (None,)
    location = (*(() if single or place is None else (place,)), *rest[1:])
    kind = PydanticCustomError(error["type"], error["msg"].replace("{", "(").replace("}", ")"), error.get("ctx"))
    return {"type": kind, "loc": location, "input": error["input"]}


GivenList = Annotated[
    list[Given],
    Field(min_length=1, max_length=MAX_BATCH, fail_fast=True),
    WrapValidator(_one_or_many),
    OneOrMany(),
]


class FeedbackId(TypedDict):
    """Feedback that is stored."""

    id: Annotated[str, about("Its id.", "fb-1f2e3d4c")]
    created_at: Annotated[str, about("When it was stored first.", EXAMPLE_TIME)]


class FeedbackAnswer(TypedDict):
    """The answer to POST /feedback."""

    feedback: Annotated[list[FeedbackId], about("In the order of the request.")]


class FeedbackEntry(FeedbackId):
    """One piece of feedback, with what it is about."""

    kind: Annotated[Kind, about("What kind of feedback.", "pair")]
    key: Annotated[str, about("The name of the API key that sent it; empty without keys.", "")]
    user: Annotated[str | None, about("Whose it is, if that was sent.", "u-17")]
    answers: Annotated[list[Answer], about("What it is about; of a pair, `a` and `b`. Copies, which stay.")]
    better: NotRequired[Annotated[Better, about("Of a pair: the better side.", "a")]]
    thumb: NotRequired[Annotated[Thumb, about("Of a thumb.")]]
    rating: NotRequired[Annotated[float, about("Of a rating.")]]
    min: NotRequired[Annotated[float, about("The lowest rating of its scale.")]]
    max: NotRequired[Annotated[float, about("The highest rating of its scale.")]]
    corrected: NotRequired[Annotated[str, about("Of an edit: the corrected text.")]]
    signal: NotRequired[Annotated[SignalName, about("Of a signal.")]]
    seconds: NotRequired[Annotated[float, about("Of the signal `dwell_seconds`.")]]
    comment: NotRequired[Annotated[str, about("Of a comment.")]]


class FeedbackPage(TypedDict):
    """A page of GET /feedback."""

    feedback: Annotated[list[FeedbackEntry], about("In the order in which it was stored.")]
    next: Annotated[str | None, about("The `after` of the next page; null if this is the last one.")]


class DeletedAnswer(TypedDict):
    """The answer to DELETE /feedback/users/{id}: how much was deleted."""

    feedback: Annotated[int, about("The user's feedback.", 3)]
    about_user: Annotated[int, about("Feedback of others on the user's generations.", 0)]
    generations: Annotated[int, about("The user's kept generations.", 12)]


class PageQuery(BaseModel):
    """Which page of which feedback."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind | None = Field(None, description="Only this kind.")
    profile: str | None = Field(
        None,
        pattern=PROFILE,
        description="Only on answers that this profile steered.",
        examples=["warm", "warm#fb09e9ae"],
    )
    user: UserId | None = Field(None, description="Only this user's.")
    since: AwareDatetime | None = Field(None, description="Only from this time on.", examples=[EXAMPLE_TIME])
    until: AwareDatetime | None = Field(None, description="Only before this time.")
    after: int = Field(0, ge=0, lt=2**63, description="The `next` of the page before.")
    limit: int = Field(100, ge=1, le=MAX_PAGE, description="The size of a page.")

    def filter(self) -> Filter:
        return Filter(self.kind, self.profile, user_id(self.user), _unix(self.since), _unix(self.until))


router = APIRouter(tags=["feedback"], route_class=StrictRoute)


async def _store(service: ReadyDep) -> FeedbackStore:
    return service.feedback


StoreDep = Annotated[FeedbackStore, Depends(_store)]


def _declare(answer: Any, *errors: int, status: int) -> dict[str, Any]:
    declared = declare(answer, *errors)
    responses = declared["responses"]
    return {**declared, "status_code": status, "responses": {status: responses.pop(200), **responses}}


GIVE_PATH = "/feedback"


@router.post(GIVE_PATH, summary="Give feedback", **_declare(FeedbackAnswer, 400, 404, 409, 410, 429, 503, status=201))
async def give(
    body: GivenList,
    response: Response,
    store: StoreDep,
    service: ServiceDep,
    caller: CallerDep,
    idempotency_key: Annotated[
        IdempotencyKey | None, Header(description="As the field; of a list, of all of it.")
    ] = None,
) -> FeedbackAnswer:
    """Store one piece of feedback, or a list of them: all or none.

    It is on disk when the answer is sent. With an idempotency key it can be sent again: the same feedback gets the same
    answer, with the header `idempotent-replayed: true`, and other feedback a 409. Keys count for each API key, and as
    long as the feedback is kept. Only generations of the same API key can be named, except by an admin.
    """
    answer, headers = await _given(body, idempotency_key, store, service, caller)
    response.headers.update(headers)
    return answer


async def _given(
    body: GivenList, key: str | None, store: FeedbackStore, service: Service, caller: Caller
) -> tuple[FeedbackAnswer, dict[str, str]]:
    """The answer to feedback, and its headers."""
    try:
        added = await store.add(_items(body, key), who(caller))
    except TrimtabError as error:
        failed = status_of(error) in (429, 503)
        for kind, count in Counter(one.kind for one in body).items():
            service.metrics.feedback(kind, "failed" if failed else "refused", count)
        raise
    outcomes = Counter((one.kind, stored.replayed) for one, stored in zip(body, added, strict=True))
    for (kind, replayed), count in outcomes.items():
        service.metrics.feedback(kind, "replayed" if replayed else "stored", count)
    headers = {"idempotent-replayed": "true"} if all(stored.replayed for stored in added) else {}
    return {"feedback": [{"id": one.id, "created_at": _time(one.created)} for one in added]}, headers


GIVEN: TypeAdapter[Any] = TypeAdapter(GivenList)
KEY: TypeAdapter[str] = TypeAdapter(IdempotencyKey)


async def give_directly(request: StrictRequest) -> Response:
    """`give` for `DirectRoutes`: an application may send thousands of votes a minute."""
    service: Service = request.app.state.service
    store = service.feedback
    key = request.headers.get("idempotency-key")
    if key is not None:
        key = valid(key, KEY, "header", "idempotency-key")
    body = await valid_body(request, GIVEN)
    caller: Caller = getattr(request.state, CALLER)
    answer, headers = await _given(body, key, store, service, caller)
    return JSONResponse(answer, 201, headers)


@router.get("/feedback", summary="List feedback", **declare(FeedbackPage, 400, 404, 503))
async def listed(query: Annotated[PageQuery, Query()], store: StoreDep) -> FeedbackPage:
    """List feedback in the order in which it was stored, with the answers that it is about. Needs the scope `admin`."""
    found = await store.page(query.filter(), after=query.after, limit=query.limit + 1)
    more = len(found) > query.limit
    shown = found[: query.limit]
    return {"feedback": [_entry(one) for one in shown], "next": str(shown[-1].seq) if more else None}


@router.delete("/feedback/users/{user:path}", summary="Delete a user", **declare(DeletedAnswer, 404, 503))
async def delete_user(
    user: Annotated[str, Path(description="The `user` of feedback and generations.", examples=["u-17"])],
    store: StoreDep,
) -> DeletedAnswer:
    """Delete all feedback of a user, their kept generations, and the feedback of others on these. Needs the scope
    `admin`.

    Generations without a user that the user gave feedback on are deleted as well. Of the id a SHA-256 is kept, so that
    feedback that is sent again or imported later does not come back: it gets a 410.
    """
    deleted = await store.delete_user(user_id(user) or "")
    return {
        "feedback": deleted.feedback,
        "about_user": deleted.about_user,
        "generations": deleted.generations,
    }


def _items(bodies: Sequence[GivenBody], header: str | None) -> list[Item]:
    """The feedback of a request, each with its idempotency key. Raises FeedbackError."""
    single = len(bodies) == 1
    items = []
    for place, body in enumerate(bodies):
        where = "" if single else f"[{place}]."
        key = body.idempotency_key
        if header is not None:
            if single and key not in (None, header):
                message = "the header Idempotency-Key and the field differ: send one of them"
                raise FeedbackError(message, param="idempotency_key")
            key = key or (header if single else f"{header}/{place}")
        items.append(body.item(cast(Any, body).kind, where, key))
    return items


def _entry(one: Stored) -> FeedbackEntry:
    entry = {"id": one.id, "created_at": _time(one.created), "kind": one.kind, "key": one.key, "user": one.user}
    return cast(FeedbackEntry, {**entry, "answers": list(one.answers), **one.value})


def _prompt(prompt: str | list[MessageBody] | None) -> str | list[Any] | None:
    if not isinstance(prompt, list):
        return prompt
    return [{"role": one.role, "content": one.content} for one in messages_of(prompt)]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _unix(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()
