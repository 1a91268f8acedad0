"""The metrics of one application, in vLLM's naming style with the prefix `trimtab_`.

`METRICS` declares them all. Numbers of the engine and the profiles are read when Prometheus scrapes, the others are
noted as requests run. Every label has a bounded set of values: a profile has series only while it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from server.engines.protocol import EngineInfo, EngineStats, FinishReason, SteeringPlan, Times

PREFIX = "trimtab_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
NO_ROUTE = "_unmatched"
WITHDRAWN = "_withdrawn"  # no profile can have this name
OTHER = "_other"
MAX_CODES = 100  # error codes that have a series of their own
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "cancelled", "timeout", "error")

SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
STRENGTHS = (-4, -3, -2, -1.5, -1, -0.75, -0.5, -0.25, -0.0001, 0.0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric. Buckets make it a histogram. What is `read` is computed when Prometheus scrapes."""

    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    read: Callable[[Snapshot], Mapping[tuple[str, ...], float]] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a server when Prometheus scrapes. `info` is None until the model is loaded."""

    version: str
    model_name: str = ""
    info: EngineInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    ready: bool = False
    served: Mapping[str, str] = field(default_factory=dict)  # versions, by the profile's name
    rejected: int = 0
    unreadable: int = 0
    directory_unreadable: bool = False
    changes: Mapping[tuple[str, ...], float] = field(default_factory=dict)  # of profiles, by action and outcome
    loads: int = 0
    rejections: int = 0
    admitted: int = 0  # generations
    body_bytes: int = 0
    answer_values: int = 0
    feedback_waiting: int = 0
    jobs: Mapping[tuple[str, ...], float] = field(default_factory=dict)  # by state


def _gauge(meaning: str, value: Callable[[Snapshot], float]) -> Declared:
    return Declared("gauge", meaning, read=lambda now: {(): value(now)})


def _total(meaning: str, value: Callable[[Snapshot], float]) -> Declared:
    return Declared("counter", meaning, read=lambda now: {(): value(now)})


def _seconds(meaning: str, buckets: tuple[float, ...] = LONG_SECONDS) -> Declared:
    return Declared("histogram", meaning, buckets=buckets)


def _kv_usage(now: Snapshot) -> float:
    return 0.0 if now.info is None else now.stats.kv_tokens / (now.info.slots * now.info.context)


def _info(now: Snapshot) -> dict[tuple[str, ...], float]:
    if now.info is None:
        return {}
    return {(now.version, now.model_name, now.info.name, now.info.dtype, now.info.path): 1}


METRICS: Mapping[str, Declared] = {
    "info": Declared(
        "gauge",
        "Always 1; the labels say what is served.",
        ("version", "model_name", "engine", "dtype", "path"),
        (),
        _info,
    ),
    "ready": _gauge("Whether the model and the profiles are loaded.", lambda now: now.ready),
    "num_requests_running": _gauge("Generations that have a slot.", lambda now: now.stats.running),
    "num_requests_waiting": _gauge("Generations that wait for a slot.", lambda now: now.stats.waiting),
    "num_generations_admitted": _gauge(
        "Generations that have a place: those that are being tokenized or compiled, wait or run.",
        lambda now: now.admitted,
    ),
    "body_bytes_in_flight": _gauge(
        "Bytes of the bodies of requests that are being answered.", lambda now: now.body_bytes
    ),
    "answer_values_in_flight": _gauge(
        "Values that the answers to running requests may report besides their text.", lambda now: now.answer_values
    ),
    "slots": _gauge("Generations that can run at once.", lambda now: 0 if now.info is None else now.info.slots),
    "slots_used": _gauge("Slots in use; a generation with divergences takes two.", lambda now: now.stats.slots_used),
    "kv_cache_usage_perc": _gauge("Share of the KV cache that running generations use, 0 to 1.", _kv_usage),
    "prefix_cache_tokens": _gauge(
        "Tokens whose KV is kept in free slots for later prompts.", lambda now: now.stats.kept_tokens
    ),
    "prefix_cache_queries": _total(
        "Prompt tokens that were looked up in the prefix cache.",
        lambda now: now.stats.prompt_tokens + now.stats.cached_tokens,
    ),
    "prefix_cache_hits": _total("Prompt tokens whose KV was reused.", lambda now: now.stats.cached_tokens),
    "prompt_tokens": _total(
        "Prompt tokens, computed or reused; a prompt counts once for each of its choices.",
        lambda now: now.stats.prompt_tokens + now.stats.cached_tokens,
    ),
    "generation_tokens": _total("Tokens drawn.", lambda now: now.stats.generated_tokens),
    "steered_tokens": _total(
        "Positions at which the residual stream was changed.", lambda now: now.stats.steered_tokens
    ),
    "engine_steps": _total("Steps of the engine.", lambda now: now.stats.steps),
    "engine_restarts": _total("Times that the engine's process was started again.", lambda now: now.stats.restarts),
    "nonfinite_rows": _total(
        "Generations that ended because their logits were not finite.", lambda now: now.stats.nonfinite_rows
    ),
    "generations": Declared(
        "counter",
        "Generations that have ended, by reason.",
        ("finished_reason",),
        read=lambda now: {(reason,): now.stats.finished.get(reason, 0) for reason in FINISH_REASONS},
    ),
    "profiles": Declared(
        "gauge",
        "Profiles by status: served, or rejected in their newest version.",
        ("status",),
        read=lambda now: {("served",): len(now.served), ("rejected",): now.rejected},
    ),
    "profile_info": Declared(
        "gauge",
        "Always 1; the versions that are served.",
        ("profile", "version"),
        read=lambda now: {(name, version[:8]): 1 for name, version in now.served.items()},
    ),
    "profile_files_unreadable": _gauge(
        "Files of the profile directory that cannot be looked at: odd names, faults of the disk, what is no file.",
        lambda now: now.unreadable,
    ),
    "profile_directory_unreadable": _gauge(
        "Whether the profile directory cannot be read.", lambda now: now.directory_unreadable
    ),
    "profile_changes": Declared(
        "counter",
        "Changes of profiles by requests, done or rejected: upload, delete, rollback, alias, unalias, delete_version.",
        ("action", "outcome"),
        read=lambda now: now.changes,
    ),
    "profile_loads": _total("Profile versions that were loaded.", lambda now: now.loads),
    "profile_rejections": _total("Profile files that were rejected.", lambda now: now.rejections),
    "feedback": Declared(
        "counter",
        "Feedback by kind and outcome: stored, replayed (sent again), refused or failed.",
        ("kind", "outcome"),
    ),
    "kept_generations": Declared(
        "counter",
        "Generations that were to be kept, by outcome: kept, full (no room to wait), failed, or deleted_user.",
        ("outcome",),
    ),
    "feedback_queue": _gauge("Feedback and generations that wait to be written.", lambda now: now.feedback_waiting),
    "jobs": Declared("gauge", "Background jobs that are stored, by state.", ("state",), read=lambda now: now.jobs),
    "requests": Declared("counter", "HTTP requests that have ended.", ("route", "method", "outcome")),
    "profile_requests": Declared(
        "counter",
        "HTTP requests by profile: one that mixes several counts for each of them.",
        ("profile", "route", "outcome"),
    ),
    "client_errors": Declared("counter", "Answers with a 4xx status, by error code.", ("status", "code")),
    "keys_refused": Declared("counter", "Requests that were refused for their API key, by error code.", ("code",)),
    "steering_changes": Declared("counter", "Changes of running generations (PATCH)."),
    "gate_decisions": Declared(
        "counter", "Decisions of profiles with a gate: opened or closed.", ("profile", "decision")
    ),
    "steering_strength": Declared(
        "histogram",
        "Strengths that were asked for, by requests and live changes; of a schedule its first.",
        ("profile",),
        STRENGTHS,
    ),
    "time_to_first_token_seconds": _seconds("From the request to its first token.", (*SHORT_SECONDS, 20, 60, 120)),
    "inter_token_latency_seconds": _seconds("Between two tokens of a generation.", SHORT_SECONDS),
    "request_queue_time_seconds": _seconds("From a generation's submission to its slot."),
    "request_prefill_time_seconds": _seconds("From a generation's slot to its first token."),
    "request_decode_time_seconds": _seconds("From a generation's first token to its last."),
    "e2e_request_latency_seconds": _seconds("From a generating request to the end of its answer, if that succeeded."),
    "request_prompt_tokens": Declared("histogram", "Prompt tokens of a generation.", (), TOKENS),
    "request_generation_tokens": Declared("histogram", "Tokens drawn for a generation.", (), TOKENS),
}


def sample_names(name: str) -> tuple[str, ...]:
    """The names that a declared metric has in the exposition and in queries."""
    endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return tuple(f"{PREFIX}{name}{ending}" for ending in endings[METRICS[name].kind])


class Metrics:
    """The metrics of one application, in a registry of its own. Its methods are called from the event loop.

    `snapshot` reads the state of the server. It is called when Prometheus scrapes.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of times beside each counter, which nothing here needs
        self.registry = CollectorRegistry()
        self._served: frozenset[str] = frozenset()
        self._codes: set[str] = set()
        self._noted: dict[str, Counter | Histogram] = {}
        self.registry.register(_Read(snapshot))
        for name, declared in METRICS.items():
            if declared.read is None:
                self._noted[name] = _made(name, declared, self.registry)
        ProcessCollector(registry=self.registry)
        self._inter_token: Histogram = self._histogram("inter_token_latency_seconds")

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve_profiles(self, names: Collection[str]) -> None:
        """The names of the profiles that are served now. The series of all others go away."""
        served = frozenset(names)
        for gone in self._served - served:
            for name, declared in METRICS.items():
                if declared.read is None and "profile" in declared.labels:
                    self._noted[name].remove_by_labels({"profile": gone})
        self._served = served

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._histogram("time_to_first_token_seconds").observe(seconds)

    def finished(self, prompt_tokens: int, completion_tokens: int, times: Times | None) -> None:
        """One generation has ended."""
        self._histogram("request_prompt_tokens").observe(prompt_tokens)
        self._histogram("request_generation_tokens").observe(completion_tokens)
        if times is not None:
            self._histogram("request_queue_time_seconds").observe(times.queue)
            self._histogram("request_prefill_time_seconds").observe(times.prefill)
            self._histogram("request_decode_time_seconds").observe(times.decode)

    def gate(self, profile: str, opened: bool) -> None:
        decision = "opened" if opened else "closed"
        self._counter("gate_decisions").labels(self._profile(profile), decision).inc()

    def steering(self, plan: SteeringPlan) -> None:
        """A request or a live change has a plan."""
        for term in plan.terms:
            self._histogram("steering_strength").labels(self._profile(term.profile)).observe(term.at(0))

    def steering_changed(self, plan: SteeringPlan) -> None:
        """A running generation has another plan now."""
        self._counter("steering_changes").inc()
        self.steering(plan)

    def key_refused(self, code: str) -> None:
        self._counter("keys_refused").labels(self._code(code)).inc()

    def request(self, route: str, method: str, outcome: str, profiles: Collection[str]) -> None:
        """One HTTP request has ended."""
        self._counter("requests").labels(route, method if method in METHODS else OTHER, outcome).inc()
        for profile in {self._profile(name) for name in profiles}:
            self._counter("profile_requests").labels(profile, route, outcome).inc()

    def generating_request(self, seconds: float) -> None:
        """One HTTP request that generates has succeeded."""
        self._histogram("e2e_request_latency_seconds").observe(seconds)

    def client_error(self, status: int, code: str) -> None:
        self._counter("client_errors").labels(str(status), self._code(code)).inc()

    def feedback(self, kind: str, outcome: str, count: int = 1) -> None:
        """Feedback of one of the kinds was stored, or was not."""
        self._counter("feedback").labels(kind, outcome).inc(count)

    def generation_kept(self, outcome: str) -> None:
        """A generation was kept, or was not. May be called from any thread."""
        self._counter("kept_generations").labels(outcome).inc()

    def _profile(self, name: str) -> str:
        return name if name in self._served else WITHDRAWN

    def _code(self, code: str) -> str:
        if len(self._codes) < MAX_CODES:
            self._codes.add(code)
        return code if code in self._codes else OTHER

    def _histogram(self, name: str) -> Histogram:
        found = self._noted[name]
        assert isinstance(found, Histogram)
        return found

    def _counter(self, name: str) -> Counter:
        found = self._noted[name]
        assert isinstance(found, Counter)
        return found


class _Read(Collector):
    """The metrics that are read when Prometheus scrapes."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        for name, declared in METRICS.items():
            if declared.read is not None:
                family: Any = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}[declared.kind]
                made = family(PREFIX + name, declared.meaning, labels=declared.labels)
                for labels, value in declared.read(now).items():
                    made.add_metric(labels, value)
                yield made


def _made(name: str, declared: Declared, registry: CollectorRegistry) -> Counter | Histogram:
    if declared.kind == "counter":
        return Counter(PREFIX + name, declared.meaning, declared.labels, registry=registry)
    buckets = declared.buckets
    return Histogram(PREFIX + name, declared.meaning, declared.labels, buckets=buckets, registry=registry)
