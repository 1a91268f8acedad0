"""What a piece of feedback and a kept generation are, as plain values: between the routes, the database and exports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, get_args

from typing_extensions import TypedDict

from server.generation.receipts import Receipts
from server.http.answers import about
from steering_vectors.errors import RequestError

Kind = Literal["pair", "thumb", "rating", "edit", "signal", "comment"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Better = Literal["a", "b", "tie"]
Thumb = Literal["up", "down"]
SignalName = Literal["copied", "regenerated", "continued", "abandoned", "dwell_seconds"]

Outcome = tuple[Any, Exception | None]  # a result, or an error

NO_FEEDBACK = "this server keeps no feedback: start it with --feedback-database"


class ChatTurn(TypedDict):
    """One turn of a conversation."""

    role: Annotated[str, about("The author.", "user")]
    content: Annotated[str, about("The text.", "How do I bake bread?")]


PromptValue = str | list[ChatTurn] | list[int]


class ModelOfAnswer(TypedDict):
    """The model that wrote an answer."""

    name: Annotated[str, about("Its name on /v1.", "demo")]
    fingerprint: Annotated[str, about("A sha256 over shapes and a sample of weights, as in its profiles.")]
    system_fingerprint: Annotated[str, about("As in OpenAI's answers.", "fp_3f1f2c9a7d10")]


class Answer(TypedDict):
    """A text that feedback is about, with everything that is known of how it came about. One that was sent as a text
    has `prompt` and `text` only."""

    prompt: Annotated[PromptValue, about("The prompt: a text, messages, or token ids.", "How do I bake bread?")]
    text: Annotated[str, about("The answer.", "Mix flour, water and yeast.")]
    generation: NotRequired[Annotated[str, about("The id of the generation.", "gen-c9f0f895")]]
    answer_id: NotRequired[Annotated[str, about("The id of the whole answer on /v1.", "chatcmpl-8f14e45f")]]
    choice: NotRequired[Annotated[int, about("The number of the choice.", 0)]]
    created: NotRequired[Annotated[float, about("Unix time in seconds.", 1763700000.0)]]
    model: NotRequired[Annotated[ModelOfAnswer, about("The model.")]]
    encoding: NotRequired[Annotated[dict[str, Any], about("How the prompt became token ids.")]]
    sampling: NotRequired[Annotated[dict[str, Any], about("The sampling parameters.", {"temperature": 1.0, "seed": 7})]]
    steering: NotRequired[Receipts]
    finish_reason: NotRequired[Annotated[str, about("`stop` or `length`.", "stop")]]
    completion_tokens: NotRequired[Annotated[int, about("The number of its tokens.", 24)]]


class FeedbackError(RequestError):
    """Feedback that cannot be taken."""

    code = "invalid_feedback"


class FeedbackOff(RequestError):
    code = "feedback_off"
    status: ClassVar[int] = 404


class UnknownUser(RequestError):
    code = "user_not_found"
    status: ClassVar[int] = 404


class IdempotencyConflict(RequestError):
    code = "idempotency_conflict"
    status: ClassVar[int] = 409


class UserDeleted(RequestError):
    code = "user_deleted"
    status: ClassVar[int] = 410


class FeedbackUnavailable(RequestError):
    code = "feedback_unavailable"
    status: ClassVar[int] = 503


@dataclass(frozen=True, slots=True)
class Who:
    """Whose key a request came with. It may name its own generations and those of the tenants `speaks_for`; an admin
    those of every key."""

    tenant: str = ""
    key: str = ""
    is_admin: bool = True
    speaks_for: frozenset[str] = frozenset()

    def may_name(self, tenant: str) -> bool:
        """Whether feedback of this key may name a tenant's generations."""
        return self.is_admin or tenant == self.tenant or tenant in self.speaks_for


@dataclass(frozen=True, slots=True)
class Subject:
    """What feedback is about, as it was sent: a generation by its id or its answer's, or a text. `param` is the field
    that names it."""

    param: str
    generation: str | None = None
    choice: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of feedback as it was sent. `value` is what was said, by its fields; `where` what errors put before the
    names of fields."""

    kind: Kind
    value: Mapping[str, Any]
    subjects: tuple[Subject, ...]
    prompt: str | list[Any] | None = None
    user: str | None = None
    idempotency_key: str | None = None
    where: str = ""

    def digest(self) -> str:
        """Equal for equal feedback; keys do not count."""
        subjects = [[one.generation, one.choice, one.text] for one in self.subjects]
        said = [self.kind, dict(self.value), subjects, self.prompt, self.user]
        return digest_of(json.dumps(said, sort_keys=True))


@dataclass(frozen=True, slots=True)
class Submission:
    """The feedback of one request, which is stored whole or not at all. `now` is its Unix time."""

    items: tuple[Item, ...]
    who: Who
    now: float


@dataclass(frozen=True, slots=True)
class Added:
    """The answer to one piece of feedback. `replayed`: it was stored before, under the same idempotency key."""

    id: str
    created: float
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """A generation that has ended, on its way to the database."""

    id: str
    choice: int
    who: Who
    user: str | None
    data: Answer


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece of feedback as it is stored, with the answers that it is about."""

    seq: int
    id: str
    created: float
    tenant: str
    key: str
    user: str | None
    kind: Kind
    value: Mapping[str, Any]
    idempotency_key: str | None
    digest: str
    answers: Sequence[Answer] = ()
    users: Sequence[str | None] = ()  # who asked for each of the answers


@dataclass(frozen=True, slots=True)
class Filter:
    """Which feedback is wanted. `profile` is NAME or NAME#SHA8, `since` and `until` are Unix times."""

    kind: Kind | None = None
    profile: str | None = None
    user: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Deleted:
    """How much was deleted. `about_user` counts feedback of others on the user's generations, which had their texts."""

    feedback: int = 0
    about_user: int = 0
    generations: int = 0


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def user_id(text: str | None) -> str | None:
    """A user's id as it is stored: PostgreSQL has no NUL, and an empty one is none."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if text else None
