"""What is known of one HTTP request: its id, its steering, its tokens and times. Whatever runs in the request's task
finds the record with `current`."""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from server.engines.errors import DeadlineExceeded
from server.engines.protocol import Delta, Event, Finished, GenerationRequest, PlanTerm, SteeringPlan, Times

if TYPE_CHECKING:
    from server.observability.metrics import Metrics

HEADER = "x-request-id"
VALID_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

Outcome = Literal[
    "success",
    "client_error",
    "unauthorized",
    "overloaded",
    "unavailable",
    "timeout",
    "server_error",
    "disconnected",
    "stream_failed",
]
OUTCOMES: Mapping[int, Outcome] = {
    401: "unauthorized",
    403: "unauthorized",
    429: "overloaded",
    499: "disconnected",
    503: "unavailable",
    504: "timeout",
}


@dataclass(slots=True, eq=False)
class Progress:
    """When a generation got its latest token, and how many it has."""

    latest: float
    tokens: int


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request while it runs. `plans` are the different steerings that it asks for."""

    id: str
    method: str
    path: str
    metrics: Metrics
    client: str | None = None  # its address
    key: str | None = None  # the name of its API key
    route: str = ""
    status: int = 0
    code: str | None = None  # of its error
    complete: bool = False  # the whole answer was sent
    plans: tuple[SteeringPlan, ...] = ()
    prompts: list[Any] | None = None  # with --log-prompts
    log_prompts: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # of generations that have ended
    finished: Counter[str] = field(default_factory=Counter)  # generations, by reason
    generations: int = 0  # that the engine has accepted
    times: list[tuple[Finished, int]] = field(default_factory=list)  # with the wall clock in nanoseconds
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)
    first_token: float | None = None
    trace_id: str | None = None
    _progress: dict[str, Progress] = field(default_factory=dict)  # of generations that have not ended

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.perf_counter() - self.began

    @property
    def outcome(self) -> Outcome:
        if self.status in OUTCOMES:
            return OUTCOMES[self.status]
        if self.status >= 500:
            return "server_error"
        if self.status >= 400:
            return "client_error"
        if not self.complete or not self.status:
            return "disconnected"
        if self.code == DeadlineExceeded.code:
            return "timeout"
        return "success" if self.code is None else "stream_failed"

    @property
    def profiles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(term.profile for plan in self.plans for term in plan.terms))

    @property
    def steering(self) -> list[str]:
        return [steering_text(plan) for plan in self.plans]

    def ask(self, requests: Sequence[GenerationRequest], prompts: Sequence[Any]) -> None:
        """The engine is asked for these generations."""
        self.plans = tuple(dict.fromkeys(request.plan for request in requests))
        if self.log_prompts:
            self.prompts = [_plain(prompt) for prompt in prompts]

    def accept(self, requests: Sequence[GenerationRequest]) -> None:
        """The engine has accepted all of them."""
        self.generations = sum(request.n for request in requests)
        for plan in self.plans:
            self.metrics.steering(plan)

    def change(self, plan: SteeringPlan) -> None:
        """A running generation has another steering now."""
        self.plans = (plan,)
        self.metrics.steering_changed(plan)

    def event(self, event: Event) -> None:
        """The engine has sent an event of one of the generations."""
        if isinstance(event, Delta):
            if event.token_ids:
                self._tokens(event.id, len(event.token_ids))
        elif isinstance(event, Finished):
            self._finish(event)

    def _tokens(self, name: str, count: int) -> None:
        now = time.perf_counter()
        progress = self._progress.get(name)
        if progress is not None:
            self.metrics.inter_token(now - progress.latest)
            progress.latest = now
            progress.tokens += count
            return
        self._progress[name] = Progress(now, count)
        if self.first_token is None:
            self.first_token = now
            self.metrics.first_token(now - self.began)

    def _finish(self, event: Finished) -> None:
        self.finished[event.reason] += 1
        self.prompt_tokens += event.prompt_tokens
        self.cached_tokens += event.cached_tokens
        self.completion_tokens += event.completion_tokens
        self._progress.pop(event.id, None)
        self.times.append((event, time.time_ns()))
        self.metrics.finished(event.prompt_tokens, event.completion_tokens, event.times)
        for profile, decision in event.gates.items():
            self.metrics.gate(profile, decision.opened)

    def end(self) -> None:
        """Count the request. Called once, when its answer has ended."""
        outcome = self.outcome
        self.metrics.request(self.route, self.method, outcome, self.profiles)
        if 400 <= self.status < 500:
            self.metrics.client_error(self.status, self.code or "none")
        if outcome == "unauthorized":
            self.metrics.key_refused(self.code or "none")
        if self.generations and outcome == "success":
            self.metrics.generating_request(self.seconds)

    def described(self) -> dict[str, Any]:
        """The fields of its line in the access log; none has text of a prompt unless that was asked for."""
        longest = _longest([event.times for event, _ in self.times if event.times is not None])
        fields: dict[str, Any] = {
            "method": self.method,
            "route": self.route,
            "path": self.path if self.route.startswith("_") else None,
            "status": self.status,
            "outcome": self.outcome,
            "code": self.code,
            "client": self.client,
            "key": self.key,
            "duration_ms": _milliseconds(self.seconds),
            "trace_id": self.trace_id,
        }
        if self.generations:
            fields |= {
                "first_token_ms": None if self.first_token is None else _milliseconds(self.first_token - self.began),
                "queue_ms": None if longest is None else _milliseconds(longest.queue),
                "prefill_ms": None if longest is None else _milliseconds(longest.prefill),
                "decode_ms": None if longest is None else _milliseconds(longest.decode),
                "generations": self.generations,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens + sum(one.tokens for one in self._progress.values()),
                "finished": dict(self.finished),
                "prompts": self.prompts,
            }
        if self.generations or self.plans:
            fields["steering"] = self.steering
        return {name: value for name, value in fields.items() if value is not None}


_current: ContextVar[RequestRecord | None] = ContextVar("trimtab_request", default=None)


def current() -> RequestRecord | None:
    """The record of the request that this task answers."""
    return _current.get()


def begin(record: RequestRecord) -> None:
    """Make a record the current one, in this task and those that it starts."""
    _current.set(record)


def request_id(given: str | None) -> str:
    """The id that a client gave, if it is short and plain; else a new one."""
    return given if given is not None and VALID_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def steering_text(plan: SteeringPlan) -> str:
    """A plan as a steering string; of a schedule the first and the last strength."""
    return "+".join(f"{term.profile}@{_strength_text(term)}" for term in plan.terms)


def _strength_text(term: PlanTerm) -> str:
    if term.schedule is None:
        return f"{term.strength:g}"
    points = term.schedule.points
    return f"{points[0][1]:g}..{points[-1][1]:g}"


def _plain(prompt: Any) -> Any:
    """A text, token ids, or the messages of a conversation as objects."""
    return [asdict(message) for message in prompt] if isinstance(prompt, tuple) else prompt


def _longest(times: Sequence[Times]) -> Times | None:
    return max(times, key=lambda one: one.queue + one.prefill + one.decode, default=None)


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
