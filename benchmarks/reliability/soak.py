"""Whether a server stays up, and counts right, under more load than it can take and clients that misbehave.

    python -m benchmarks.reliability.soak [--minutes 60] [--overload 1.5] [--deadline 30] [--seed 0] [--json FILE]

A server of the demo model with API keys gets mixed requests at a multiple of the rate that it was measured to answer.
Of those that generate, 30 % are left at a random point, some readers stall, and strengths of running streams change.
Every five seconds a profile is replaced, and garbage is sent to the routes and put into the profile directory. At the
end, each promise is one line with what was seen, and the exit code is 1 if one of them was broken.

A client cannot know how a request ended that it left. Of those, the outcome is the one of their line in the server's
log, of which there must be exactly one for each.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import torch
import typer
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.serving import Server, serving
from benchmarks.reliability.attempts import Answer, Attempt, Leave, send
from server.access.keys import add_key
from server.observability.request_record import OUTCOMES
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile

SETTINGS: Mapping[str, Any] = {
    "slots": 8,
    "max_queue": 24,
    "context": 256,
    "write_timeout_seconds": 2,
    "log_format": "json",
}
PROFILES = ("warm", "concise", "careful", "honest")
REPLACE_S = 5.0
PROGRESS_S = 10.0
SETTLE_S = 20.0  # in which everything that was left must have ended
LEFT = 0.3  # of the requests that generate
STALLED = 0.02
CHANGED = 0.2  # of the streams
MAX_GROWTH = 0.02
UNANSWERED = "unanswered"
POOLED = 6  # threads for long texts (2), large answers (1), constraints (2) and steerings (1)
WARM_UP = 0.2  # of the time, whose memory does not count
SENTENCES = ("How do I bake bread?", "Tell me about the sea.", "What is a good way to learn a language?", "Bread is")


@dataclass(frozen=True, slots=True)
class Check:
    """One promise: what was seen, and whether it was kept."""

    promise: str
    seen: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Process:
    """What a process holds."""

    resident: int  # KiB
    descriptors: int
    threads: int


@dataclass(slots=True)
class Seen:
    """All that the client saw."""

    answers: list[Answer] = field(default_factory=list)
    samples: list[tuple[float, Process]] = field(default_factory=list)  # by second
    replaced: int = 0
    spoilt: int = 0  # files of garbage


class Mix:
    """A seeded source of requests."""

    def __init__(self, seed: int, keys: Mapping[str, str], routes: Mapping[str, Any]) -> None:
        self._draw = random.Random(seed)
        self._keys = keys
        self.uploads = "put" in routes.get("/profiles/{name}", {})
        self._count = 0

    def next(self) -> Attempt:
        draw = self._draw
        if draw.random() < 0.1:
            return self._garbage()
        leave = self._leave()
        if leave is not None and leave.stalled:  # an answer that no buffer holds
            body: dict[str, Any] = {"model": "demo", "prompt": "a", "n": 8, "logprobs": 20, "max_tokens": 200}
            return self._attempt("/v1/completions", {**body, "ignore_eos": True, "stream": True}, leave)
        tokens, stream = draw.randint(4, 48), draw.random() < 0.7
        common = {"max_tokens": tokens, "seed": draw.randrange(2**31), "stream": stream}
        prompt, steering = draw.choice(SENTENCES), self._steering()
        chat = {"messages": [{"role": "user", "content": prompt}]}
        counted = {"stream_options": {"include_usage": True}} if stream else {}
        forms: list[tuple[str, dict[str, Any]]] = [
            ("/generate", {**chat, **common, "steering": steering}),
            ("/generate", {"prompt": prompt, **common, "steering": steering}),
            ("/v1/chat/completions", {"model": "demo", **chat, **common, **counted, "steering": steering}),
            ("/v1/completions", {"model": "demo", "prompt": prompt, "n": 2, **common, **counted, "steering": steering}),
            ("/compare", {**chat, **common, "variants": [steering, {"profiles": []}], "kl": draw.random() < 0.3}),
            ("/score", {"prompt": prompt, "completions": [" an oven.", " the sea."], "steering": steering}),
        ]
        # of several generations, a log does not say which had ended when they were left
        weights = (4, 3, 4, 2, 1, 1) if leave is None else (4, 3, 4, 0, 0, 0)
        route, body = draw.choices(forms, weights)[0]
        if route in ("/generate", "/v1/chat/completions") and draw.random() < 0.1:
            body |= draw.choice(({"guided_regex": "[a-z ]{8,40}"}, {"guided_choice": ["yes", "no"]}))
        return self._attempt(route, body, leave)

    def change(self, generation: str) -> Attempt:
        """A change of a running generation's strength."""
        body = json.dumps({"steering": self._steering()}).encode()
        return self._made("PATCH", "/generations/{generation_id}", f"/generations/{generation}", body, "admin")

    def upload(self, name: str, content: bytes) -> Attempt:
        """A profile that is sent; only if the server takes `uploads`."""
        made = self._made("PUT", "/profiles/{name}", f"/profiles/{name}", content, "admin")
        return replace(made, content_type="application/octet-stream")

    def changes(self) -> bool:
        return self._draw.random() < CHANGED

    def gap(self, rate: float) -> float:
        """Seconds to the next request of a Poisson process."""
        return self._draw.expovariate(rate)

    def bytes(self, most: int) -> bytes:
        return self._draw.randbytes(self._draw.randint(0, most))

    def _steering(self) -> dict[str, Any]:
        chosen = self._draw.sample(PROFILES, self._draw.choice((0, 1, 1, 1, 2)))
        strengths = [round(self._draw.uniform(-0.9, 0.9), 2) for _ in chosen]
        return {"profiles": [{"name": one, "strength": alpha} for one, alpha in zip(chosen, strengths, strict=True)]}

    def _leave(self) -> Leave | None:
        draw = self._draw
        if draw.random() < STALLED:
            return Leave("sent", stalled=draw.uniform(1, 6))
        if draw.random() >= LEFT:
            return None
        point = draw.choices(("headers", "body", "sent", "events"), (1, 1, 2, 6))[0]
        return Leave(point, draw.choice((0, 1, 2, 5, 12, 30)) if point == "events" else 0)

    def _garbage(self) -> Attempt:
        draw = self._draw
        route = draw.choice(("/generate", "/v1/completions", "/v1/chat/completions", "/compare", "/score"))
        body = draw.choice(
            (
                self.bytes(2000),
                b'{"prompt": "a", "max_tokens": ' + b"9" * draw.randint(1, 400) + b"}",
                b"[" * draw.randint(1, 5000),
                json.dumps({"model": "demo", "prompt": "a", "steering": "nobody@0.5"}).encode(),
                json.dumps({"prompt": "ab" * draw.randint(1, 50_000)}).encode(),
                json.dumps(
                    {"prompt": "a", "logit_bias": {str(place): 1 for place in range(draw.randint(1, 3000))}}
                ).encode(),
            )
        )
        if draw.random() < 0.2:
            return self._made("POST", route, route, body, "nobody")
        if self.uploads and draw.random() < 0.3:
            return self.upload("garbage", self.bytes(20_000))
        return self._made("POST", route, route, body, "first")

    def _attempt(self, route: str, body: Mapping[str, Any], leave: Leave | None) -> Attempt:
        key = self._draw.choice(("first", "second", "narrow"))
        return self._made("POST", route, route, json.dumps(body).encode(), key, leave)

    def _made(self, method: str, route: str, path: str, body: bytes, key: str, leave: Leave | None = None) -> Attempt:
        self._count += 1
        return Attempt(f"soak-{self._count}", route, method, path, body, self._keys.get(key, "wrong"), leave)


class Soak:
    """One run against one server."""

    def __init__(self, server: Server, mix: Mix, directory: Path, variants: Mapping[str, list[bytes]]) -> None:
        self.server = server
        self.seen = Seen()
        self._mix = mix
        self._directory = directory
        self._variants = variants
        self._began = time.monotonic()

    async def capacity(self, seconds: float) -> float:
        """Requests per second that are answered when as many run as there are slots."""
        end, before = time.monotonic() + seconds, len(self.seen.answers)

        async def loop() -> None:
            while time.monotonic() < end:
                await self._one(self._mix.next())

        began = time.monotonic()
        await asyncio.gather(*(loop() for _ in range(SETTINGS["slots"])))
        return (len(self.seen.answers) - before) / (time.monotonic() - began)

    async def offer(self, rate: float, seconds: float) -> None:
        """Send requests at a rate, whatever becomes of them, and wait for those that are answered."""
        others = [asyncio.create_task(work()) for work in (self._sample, self._report, self._replace)]
        end = time.monotonic() + seconds
        try:
            async with asyncio.TaskGroup() as tasks:
                due = time.monotonic()
                while (due := due + self._mix.gap(rate)) < end:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    tasks.create_task(self._one(self._mix.next()))
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _one(self, attempt: Attempt) -> None:
        async def change(event: Mapping[str, Any]) -> None:
            name = event.get("id")
            if attempt.route == "/generate" and name is not None and "delta" in event and self._mix.changes():
                self.seen.answers.append(await send(self.server.port, self._mix.change(str(name))))

        self.seen.answers.append(await send(self.server.port, attempt, change))

    async def _sample(self) -> None:
        while True:
            self.seen.samples.append((time.monotonic() - self._began, process(self.server.pid)))
            await asyncio.sleep(1)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            answers, (at, now) = self.seen.answers, self.seen.samples[-1]
            kinds = Counter("left" if one.left else outcome_of(one) for one in answers)
            print(
                f"{at:6.0f} s: {len(answers)} sent, {dict(sorted(kinds.items()))}, {self.seen.replaced} profiles "
                f"replaced, {now.resident / 1024:.1f} MiB, {now.descriptors} descriptors, {now.threads} threads",
                flush=True,
            )

    async def _replace(self) -> None:
        """Replace a profile, in turn, as a file or by sending it; and put a file of garbage beside them."""
        while True:
            await asyncio.sleep(REPLACE_S)
            name = PROFILES[self.seen.replaced % len(PROFILES)]
            round_ = self.seen.replaced // len(PROFILES)
            content = self._variants[name][(round_ + 1) % len(self._variants[name])]
            if self._mix.uploads and self.seen.replaced % 2:
                self.seen.answers.append(await send(self.server.port, self._mix.upload(name, content)))
            else:
                place(self._directory / f"{name}.safetensors", content)
            self.seen.replaced += 1
            place(self._directory / "garbage.safetensors", self._mix.bytes(5000))
            self.seen.spoilt += 1


def place(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def process(pid: int) -> Process:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return Process(int(fields["VmRSS"][0]), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(fields["Threads"][0]))


def outcome_of(answer: Answer) -> str:
    """The outcome of an answer that was read to its end, as the metrics name it."""
    if not answer.status:
        return UNANSWERED
    if answer.status in OUTCOMES:
        return OUTCOMES[answer.status]
    if answer.status >= 400:
        return "server_error" if answer.status >= 500 else "client_error"
    return "success" if answer.error is None else "stream_failed"


def terminal_events(answer: Answer) -> int:
    """The terminal events of a stream: ends of choices, and errors."""
    ends = 0
    for event in answer.events:
        if "choices" in event:
            ends += sum(choice["finish_reason"] is not None for choice in event["choices"])
        elif "finish_reason" in event:
            ends += 1
    return ends


def generations_of(attempt: Attempt) -> int:
    """How many generations a request asks for."""
    body = json.loads(attempt.body)
    return int(body.get("n", 1)) * len(body.get("variants") or body.get("completions") or [""])


def tokens_of(answer: Answer) -> int:
    """The generated tokens of an answer that was read to its end."""
    usages = [event["usage"] for event in answer.events if event.get("usage")]
    usages += [one["usage"] for event in answer.events for one in event.get("variants", ())]
    return sum(usage["completion_tokens"] for usage in usages)


Series = Counter[tuple[str, tuple[tuple[str, str], ...]]]


def scrape(server: Server, key: str) -> Series:
    """All samples of /metrics, by name and labels."""
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=60).text
    found: Series = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value  # type: ignore[assignment]
    return found


def by_label(series: Series, name: str, *labels: str) -> Counter[tuple[str, ...]]:
    """The samples of a metric that are not 0, by these labels."""
    found: Counter[tuple[str, ...]] = Counter()
    for (one, pairs), value in series.items():
        if one == f"trimtab_{name}" and value:
            found[tuple(dict(pairs)[label] for label in labels)] += int(value)
    return found


def counted_lines(log: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the access log, by request."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if record.get("logger") == "server.access" and record.get("message") == "request":
                found.setdefault(record["request_id"], []).append(record)
    return found


@dataclass(frozen=True, slots=True)
class Books:
    """The client's own counts."""

    requests: Counter[tuple[str, ...]]  # by route, method and outcome
    errors: Counter[tuple[str, ...]]  # of the client, by status and code
    changes: int
    tokens: int  # generated
    generations: int  # accepted


def count(answers: list[Answer], lines: Mapping[str, list[dict[str, Any]]]) -> Books:
    """What the server should have counted."""
    books = Books(Counter(), Counter(), 0, 0, 0)
    changes = tokens = generations = 0
    for one in answers:
        attempt = one.attempt
        if one.left:
            for line in lines.get(attempt.id, []):
                books.requests[attempt.route, attempt.method, line["outcome"]] += 1
                if 400 <= line["status"] < 500:
                    books.errors[str(line["status"]), line.get("code", "none")] += 1
                if line["status"] in (200, 499) and "generations" in line:
                    generations += line["generations"]
                    tokens += finished_tokens(attempt, line)
            continue
        books.requests[attempt.route, attempt.method, outcome_of(one)] += 1
        if 400 <= one.status < 500:
            error = one.error or {}
            books.errors[str(one.status), error.get("code") or error.get("type") or "none"] += 1
        elif one.status == 200 and attempt.method == "POST":
            generations += generations_of(attempt)
            tokens += tokens_of(one)
        elif one.status == 200 and attempt.method == "PATCH":
            changes += 1
    return Books(books.requests, books.errors, changes, tokens, generations)


def finished_tokens(attempt: Attempt, line: Mapping[str, Any]) -> int:
    """The tokens of the generations that had ended when a request was left. Where it had several, all are as long."""
    body, ended = json.loads(attempt.body), sum(line.get("finished", {}).values())
    return int(body["max_tokens"] * ended if body.get("ignore_eos") else line["completion_tokens"] * ended)


def checks(
    seen: Seen,
    books: Books,
    lines: Mapping[str, list[Any]],
    metrics: Series,
    held: tuple[Process, Process],
    deadline: float,
) -> Iterator[Check]:
    """Every promise, in words."""
    answers = seen.answers
    statuses = Counter(one.status for one in answers if one.status)
    bad = {status: number for status, number in statuses.items() if status >= 500 and status != 503}
    whole = [one for one in answers if not one.left]
    failed, silent = (sum(outcome_of(one) == kind for one in whole) for kind in ("stream_failed", UNANSWERED))
    shown = f"{dict(sorted(statuses.items()))}, {failed} streams failed, {silent} requests unanswered"
    yield Check("every request is answered, and with no 5xx but a 503", shown, not bad and not silent)
    accepted = [one for one in answers if one.status == 200 and not one.left and one.is_stream]
    wrong = [one for one in accepted if one.error is None and terminal_events(one) != generations_of(one.attempt)]
    yield Check(
        "every accepted stream has one terminal event for each generation",
        f"{len(accepted)} streams, {len(wrong)} without",
        not wrong,
    )
    sent = Counter(one.attempt.id for one in answers if one.sent)
    logged = Counter({name: len(found) for name, found in lines.items() if name.startswith("soak-")})
    yield Check(
        "every request ends once, also those that were left",
        f"{sum(sent.values())} sent, {sum(one.left for one in answers)} left, {sum(logged.values())} ended",
        sent == logged,
    )
    yield _growth(seen)
    first, last = held
    shown = f"{first.descriptors} before, {last.descriptors} after"
    yield Check("no descriptor is leaked", shown, last.descriptors <= first.descriptors)
    shown = f"{first.threads} before, {last.threads} after; pools may start {POOLED} when they first need them"
    yield Check("no thread is leaked", shown, last.threads <= first.threads + POOLED)
    gauges = {
        name: metrics[f"trimtab_{name}", ()] for name in ("num_requests_running", "num_requests_waiting", "slots_used")
    }
    yield Check(
        "no slot is leaked", str({name: int(value) for name, value in gauges.items()}), not any(gauges.values())
    )
    waits = sorted(one.seconds for one in answers if one.status == 200 and not one.left) or [0.0]
    yield Check(
        f"admitted requests are answered within {deadline:g} s",
        f"median {median(waits):.2f} s, longest {waits[-1]:.2f} s",
        waits[-1] <= deadline,
    )
    yield from _equal(books, metrics)


def _growth(seen: Seen) -> Check:
    after = [one.resident for at, one in seen.samples if at >= WARM_UP * seen.samples[-1][0]]
    part = max(1, len(after) // 8)
    before, last = median(after[:part]), median(after[-part:])
    growth = last / before - 1
    seen_text = f"{before / 1024:.1f} MiB after warming up, {last / 1024:.1f} MiB at the end, {100 * growth:+.2f} %"
    return Check("memory grows by less than 2 %", seen_text, growth < MAX_GROWTH)


def _equal(books: Books, metrics: Series) -> Iterator[Check]:
    """The client's counts beside those of the server."""
    requests = by_label(metrics, "requests_total", "route", "method", "outcome")
    requests.subtract({("_unmatched", "GET", "success"): 1})  # the document, which says whether profiles can be sent
    ours = Counter({labels: number for labels, number in requests.items() if labels[0] not in ("/metrics", "/ready")})
    yield _same("requests by route, method and outcome", books.requests, ours)
    yield _same("refusals by status and code", books.errors, by_label(metrics, "client_errors_total", "status", "code"))
    pairs = (
        ("live changes", books.changes, metrics["trimtab_steering_changes_total", ()]),
        (
            "generated tokens of generations that ended",
            books.tokens,
            metrics["trimtab_request_generation_tokens_sum", ()],
        ),
        (
            "accepted generations",
            books.generations,
            sum(by_label(metrics, "generations_total", "finished_reason").values()),
        ),
    )
    for what, own, theirs in pairs:
        yield Check(f"{what}: the client's count is the server's", f"{own} and {int(theirs)}", own == theirs)


def _same(what: str, own: Counter[tuple[str, ...]], theirs: Counter[tuple[str, ...]]) -> Check:
    different = {labels: (own[labels], theirs[labels]) for labels in own | theirs if own[labels] != theirs[labels]}
    shown = f"{sum(own.values())} in {len(own)} series" + (f", different: {different}" if different else "")
    return Check(f"{what}: the client's counts are the server's", shown, not different)


@contextmanager
def soaking(seed: int) -> Iterator[tuple[Soak, Path, str]]:
    """A run's server, with its log and the key of an administrator."""
    with tempfile.TemporaryDirectory() as folder:
        directory, log, key_file = Path(folder) / "profiles", Path(folder) / "log", Path(folder) / "keys"
        directory.mkdir()
        variants = made_profiles(load_model("demo").identity, Path(folder))
        for name, contents in variants.items():
            place(directory / f"{name}.safetensors", contents[0])
        keys = {
            "admin": add_key(key_file, "admin", ("admin",))[0],
            "first": add_key(key_file, "first", tokens_per_minute=10**9)[0],
            "second": add_key(key_file, "second")[0],
            "narrow": add_key(key_file, "narrow", concurrent_requests=4)[0],
        }
        with serving("demo", directory, log=log, api_key_file=key_file, **SETTINGS) as server:
            routes = httpx.get(f"{server.url}/openapi.json").json()["paths"]
            yield Soak(server, Mix(seed, keys, routes), directory, variants), log, keys["admin"]


def made_profiles(identity: ModelIdentity, folder: Path) -> dict[str, list[bytes]]:
    """Two versions of each profile, with random directions."""
    generator = torch.Generator().manual_seed(0)

    def version(name: str) -> bytes:
        directions = {layer: torch.randn(identity.hidden_size, generator=generator) for layer in (1, 3)}
        profile = Profile(name=name, model=identity, directions=directions, method="random")
        return save_profile(profile, folder / "staged").read_bytes()

    return {name: [version(name), version(name)] for name in PROFILES}


def settled(server: Server, key: str) -> Series:
    """The metrics once nothing runs, or after the time in which everything should have ended."""
    last = time.monotonic() + SETTLE_S
    while True:
        found = scrape(server, key)
        busy = found["trimtab_num_requests_running", ()] + found["trimtab_num_requests_waiting", ()]
        if not busy or time.monotonic() > last:
            return found
        time.sleep(0.2)


def run(
    seconds: float, overload: float, deadline: float, seed: int, measuring: float
) -> tuple[list[Check], dict[str, Any]]:
    """All checks, and the figures of the run."""
    with soaking(seed) as (soak, log, key):
        capacity = asyncio.run(soak.capacity(measuring))
        settled(soak.server, key)
        time.sleep(1.0)  # for connections that the other side closes
        before = process(soak.server.pid)
        print(f"{capacity:.1f} requests per second are answered; {overload * capacity:.1f} are sent", flush=True)
        asyncio.run(soak.offer(overload * capacity, seconds))
        settled(soak.server, key)
        time.sleep(1.0)
        metrics, after = scrape(soak.server, key), process(soak.server.pid)
        lines = counted_lines(log)
        books = count(soak.seen.answers, lines)
        found = list(checks(soak.seen, books, lines, metrics, (before, after), deadline))
    figures = {
        "seconds": seconds,
        "seed": seed,
        "capacity": capacity,
        "offered": overload * capacity,
        "sent": len(soak.seen.answers),
        "left": sum(one.left for one in soak.seen.answers),
        "stalled": sum(bool(one.attempt.leave and one.attempt.leave.stalled) for one in soak.seen.answers),
        "changes": books.changes,
        "profiles_replaced": soak.seen.replaced,
        "garbage_files": soak.seen.spoilt,
        "generated_tokens": books.tokens,
    }
    return found, figures


def main(
    minutes: Annotated[float, typer.Option(help="How long to send requests.")] = 60.0,
    overload: Annotated[float, typer.Option(help="The rate, as a multiple of what the server answers.")] = 1.5,
    deadline: Annotated[float, typer.Option(help="Maximum seconds of a request that is admitted.")] = 30.0,
    measuring: Annotated[float, typer.Option(help="Seconds in which the capacity is measured.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Chooses the requests.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write checks and figures here.")] = None,
) -> None:
    found, figures = run(60 * minutes, overload, deadline, seed, measuring)
    for one in found:
        print(f"{'pass' if one.kept else 'FAIL'}  {one.promise}: {one.seen}")
    print(", ".join(f"{name} {value:g}" for name, value in figures.items()))
    if out is not None:
        out.write_text(json.dumps({**figures, "checks": [asdict(one) for one in found]}, indent=2) + "\n")
    if not all(one.kept for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
