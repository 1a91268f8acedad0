"""/metrics: a client's own counts equal it exactly, labels are bounded, and it costs next to nothing."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from server.engines.config import EngineConfig
from server.engines.protocol import PlanTerm, SteeringPlan, StrengthSchedule
from server.observability.metrics import MAX_CODES, METRICS, NO_ROUTE, OTHER, WITHDRAWN, Metrics, Snapshot
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.gate import Gate
from tests.support.running import HeldEngine
from tests.support.serving import live_server, random_profile, save_profiles, until

POISON = 7  # a token whose embedding is not a number
FREE = {"ignore_eos": True, "temperature": 0}
CONTROL_ROUTES = ("/metrics", "/ready")  # how often they are asked depends on the clock

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """One sample; 0 if there is none."""
    return found.get((f"trimtab_{name}", frozenset(labels.items())), 0.0)


def labelled(found: Samples, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a name, by their labels' values in the declared order."""
    declared = METRICS[name.removesuffix("_total").removesuffix("_count")]
    return {
        tuple(dict(labels)[label] for label in declared.labels): number
        for (sample, labels), number in found.items()
        if sample == f"trimtab_{name}"
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[HeldEngine]:
    language_model = load_model("demo", dtype="float32")
    head: Any = language_model.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)  # shared with the other embeddings
    with torch.no_grad():
        language_model.model.get_input_embeddings().weight[POISON] = math.nan
    engine = HeldEngine(language_model, EngineConfig(slots=4, max_queue=4))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def profiles(engine: HeldEngine, tmp_path: Path) -> Path:
    save_profiles(tmp_path, engine.info.identity, "warm", "concise", unit=0.05)
    direction = torch.randn(engine.info.identity.hidden_size, generator=torch.Generator().manual_seed(3))
    for name, threshold in (("opens", -2.0), ("shuts", 2.0)):
        gate = Gate(1, direction, threshold, "above")
        save_profile(random_profile(engine.info.identity, name, seed=5, unit=0.05, gate=gate), tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a profile")
    return tmp_path


@pytest.fixture
def client(engine: HeldEngine, profiles: Path) -> Iterator[httpx.Client]:
    with live_server(engine, profiles, max_queue=4) as client:
        yield client


class Counts:
    """What a client counts of its own requests."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.by_profile: Counter[tuple[str, str, str]] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self.strengths: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()

    def request(self, route: str, outcome: str, profiles: tuple[str, ...] = (), method: str = "POST") -> None:
        self.requests[route, method, outcome] += 1
        for profile in profiles:
            self.by_profile[profile, route, outcome] += 1

    def generation(self, prompt: int, drawn: int, reason: str = "length") -> None:
        """One choice that was finished."""
        self.totals["generations"] += 1
        self.totals["prompt_tokens_total"] += prompt
        self.totals["generation_tokens_total"] += drawn
        self.totals["inter_token_latency_seconds_count"] += max(0, drawn - 1)
        self.finished[reason] += 1

    def failed(self, route: str, answer: httpx.Response, code: str, method: str = "POST", *, outcome: str = "") -> None:
        assert answer.json()["error"]["code"] == code, answer.text
        self.requests[route, method, outcome or "client_error"] += 1
        self.errors[str(answer.status_code), code] += 1


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


def json_of(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_clients_own_counts_equal_the_metrics(client: httpx.Client, engine: HeldEngine) -> None:
    before = samples(client.get("/metrics").text)
    counts = Counts()
    for number in range(3):
        body = {"prompt": "Bread is baked in", "max_tokens": 4 + number, "steering": "warm@0.5+concise@-0.25", **FREE}
        usage = json_of(client.post("/generate", json=body))["usage"]
        counts.request("/generate", "success", ("warm", "concise"))
        counts.strengths.update(("warm", "concise"))
        counts.generation(usage["prompt_tokens"], usage["completion_tokens"])
    for _ in range(2):
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "n": 2, "model": "demo:warm@0.75"}
        usage = json_of(client.post("/v1/chat/completions", json={**chat, **FREE}))["usage"]
        counts.request("/v1/chat/completions", "success", ("warm",))
        counts.strengths["warm"] += 1
        for _ in range(2):
            counts.generation(usage["prompt_tokens"], usage["completion_tokens"] // 2)
    body = {
        "prompt": "Bread is",
        "variants": ["warm@1", {"profiles": []}, "concise@1"],
        "max_tokens": 3,
        "stream": True,
    }
    ends = [one for one in events(client.post("/compare", json={**body, **FREE})) if "usage" in one]
    counts.request("/compare", "success", ("warm", "concise"))
    counts.strengths.update(("warm", "concise"))
    for end in ends:
        counts.generation(end["usage"]["prompt_tokens"], end["usage"]["completion_tokens"])
    body = {"model": "demo", "prompt": ["Once", "Bread"], "max_tokens": 2, "stream": True, **FREE}
    with client.stream("POST", "/v1/completions", json={**body, "stream_options": {"include_usage": True}}) as answer:
        answer.read()
    (usage,) = [one["usage"] for one in events(answer) if one.get("usage")]
    counts.request("/v1/completions", "success")
    counts.generation(usage["prompt_tokens"], 2)
    counts.generation(0, 2)
    body = {"prompt": "Bread is baked in", "completions": [" an oven.", " the sea."], "steering": "warm@0.5"}
    usage = json_of(client.post("/score", json=body))["usage"]
    counts.request("/score", "success", ("warm",))
    counts.strengths["warm"] += 1
    counts.generation(usage["prompt_tokens"], 0)
    counts.generation(0, 0)
    scored = 1  # requests that generate no token
    for name in ("opens", "shuts"):
        body = {"prompt": "Bread is baked in", "max_tokens": 3, "steering": f"{name}@0.5", **FREE}
        usage = json_of(client.post("/generate", json=body))["usage"]
        counts.request("/generate", "success", (name,))
        counts.strengths[name] += 1
        counts.generation(usage["prompt_tokens"], usage["completion_tokens"])

    # one that is changed while it runs, and one whose client goes away
    engine.hold(after=3)
    body = {"prompt": "Bread is", "max_tokens": 12, "stream": True, "steering": "warm@0.5", **FREE}
    with client.stream("POST", "/generate", json=body) as answer:
        lines = answer.iter_lines()
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        engine.until_held()
        engine.hold(until_change=True)
        engine.go()
        changed = client.patch(f"/generations/{name}", json={"steering": "concise@-0.5"})
        engine.go()
        *_, last = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert changed.status_code == 200, changed.text
    counts.request("/generate", "success", ("warm",))
    counts.request("/generations/{generation_id}", "success", ("concise",), method="PATCH")
    counts.strengths.update(("warm", "concise"))
    counts.generation(last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])

    counts.failed("/generate", client.post("/generate", json={"prompt": "a", "colour": "red"}), "unknown_field")
    answer = client.post("/generate", json={"prompt": "a", "steering": "concise@99"})
    counts.failed("/generate", answer, "strength_out_of_range")
    counts.by_profile["concise", "/generate", "client_error"] += 1
    for _ in range(2):
        answer = client.post("/generate", json={"prompt": "a", "steering": "kind"})
        counts.failed("/generate", answer, "profile_not_found")
    counts.failed(NO_ROUTE, client.get("/nothing"), "route_not_found", "GET")
    counts.failed(NO_ROUTE, client.get("/nothing/else"), "route_not_found", "GET")
    counts.failed("/profiles/{name}", client.get("/profiles/kind"), "profile_not_found", "GET")
    counts.failed("/generate", client.get("/generate"), "method_not_allowed", "GET")
    counts.failed("/generate", client.request("LOCK", "/generate"), "method_not_allowed", OTHER)
    answer = client.patch("/generations/gen-0", json={"steering": "warm"})
    counts.failed("/generations/{generation_id}", answer, "generation_not_found", "PATCH")
    body = {"model": "demo", "prompt": [5, POISON], "max_tokens": 4}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"
    counts.request("/v1/completions", "server_error")
    counts.totals["generations"] += 1
    counts.totals["prompt_tokens_total"] += 2
    counts.finished["error"] += 1
    for _ in range(4):
        client.get("/health").raise_for_status()
        counts.request("/health", "success", method="GET")

    expected = {labels: float(number) for labels, number in counts.requests.items()}

    def now() -> Samples:
        return samples(client.get("/metrics").text)

    def requests(found: Samples) -> dict[tuple[str, ...], float]:
        every = labelled(found, "requests_total")
        return {labels: number for labels, number in every.items() if labels[0] not in CONTROL_ROUTES}

    until(lambda: sum(requests(now()).values()) == sum(expected.values()))
    found = now()
    assert requests(found) == expected
    assert labelled(found, "profile_requests_total") == counts.by_profile
    assert labelled(found, "client_errors_total") == counts.errors
    strengths = {profile: number for (profile,), number in labelled(found, "steering_strength_count").items()}
    assert strengths == counts.strengths
    assert labelled(found, "gate_decisions_total") == {("opens", "opened"): 1, ("shuts", "closed"): 1}
    reasons = {reason: number for (reason,), number in labelled(found, "generations_total").items()}
    assert reasons == {"stop": 0, "cancelled": 0, "timeout": 0, **counts.finished}
    for name in ("prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_count"):
        assert value(found, name) - value(before, name) == counts.totals[name], name
    succeeded = [labels for labels in counts.requests.elements() if labels[1:] == ("POST", "success")]
    assert value(found, "e2e_request_latency_seconds_count") == len(succeeded)
    assert value(found, "time_to_first_token_seconds_count") == len(succeeded) - scored
    for phase in ("queue", "prefill", "decode"):
        assert value(found, f"request_{phase}_time_seconds_count") == counts.totals["generations"]
    assert value(found, "request_generation_tokens_sum") == counts.totals["generation_tokens_total"]
    assert value(found, "request_prompt_tokens_sum") == counts.totals["prompt_tokens_total"]
    assert value(found, "steering_changes_total") == 1
    assert value(found, "nonfinite_rows_total") == 1
    assert value(found, "profile_loads_total") == 4
    assert value(found, "profile_rejections_total") == 1
    assert labelled(found, "profiles") == {("served",): 4, ("rejected",): 1}
    assert value(found, "ready") == 1
    assert value(found, "slots") == 4
    for name in ("num_requests_running", "num_requests_waiting", "slots_used", "kv_cache_usage_perc"):
        assert value(found, name) == 0
    assert value(found, "prefix_cache_hits_total") <= value(found, "prefix_cache_queries_total")
    assert value(found, "prefix_cache_tokens") > 0
    # strengths fall into their buckets: −0.5 once, at the live change
    below = value(found, "steering_strength_bucket", profile="concise", le="-0.5")
    assert below == 1


@pytest.mark.slow
def test_what_runs_waits_and_is_held_shows_while_it_does(client: httpx.Client, engine: HeldEngine) -> None:
    before = samples(client.get("/metrics").text)
    engine.hold(after=4)
    body = {"model": "demo", "prompt": "Bread is baked in", "max_tokens": 400, "n": 6, "stream": True, **FREE}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # the answer is closed when it is dropped
        next(lines)
        engine.until_held()
        found = samples(client.get("/metrics").text)
        assert value(found, "num_requests_running") == 4
        assert value(found, "num_requests_waiting") == 2
        assert value(found, "slots_used") == 4
        held = value(found, "kv_cache_usage_perc") * engine.info.slots * engine.info.context
        assert held == sum(state.computed for state in engine._scheduler.running) > 0
        full = client.post("/v1/completions", json={"model": "demo", "prompt": "a", "n": 3})
        assert full.json()["error"]["code"] == "overloaded"
        engine.go()
    until(lambda: value(samples(client.get("/metrics").text), "num_requests_running") == 0)
    found = samples(client.get("/metrics").text)
    assert value(found, "requests_total", route="/v1/completions", method="POST", outcome="disconnected") == 1
    assert value(found, "requests_total", route="/v1/completions", method="POST", outcome="overloaded") == 1
    assert value(found, "client_errors_total", status="429", code="overloaded") == 1
    cancelled = [value(one, "generations_total", finished_reason="cancelled") for one in (before, found)]
    assert cancelled[1] - cancelled[0] == 6


def test_the_series_of_a_removed_profile_go_away(client: httpx.Client, profiles: Path) -> None:
    def names() -> set[str]:
        return {
            dict(labels)["profile"] for _, labels in samples(client.get("/metrics").text) if "profile" in dict(labels)
        }

    body = {"prompt": "Bread is", "max_tokens": 2, "steering": "concise@0.5", **FREE}
    client.post("/generate", json=body).raise_for_status()
    until(lambda: "concise" in names())
    (profiles / "concise.safetensors").unlink()
    until(lambda: "concise" not in names())
    assert client.post("/generate", json=body).status_code == 404
    assert "concise" not in names()


def test_refused_keys_are_counted_for_the_route(engine: HeldEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    key = {"authorization": "Bearer secret"}
    with live_server(engine, profiles, api_key_file=keys) as client:
        for _ in range(3):
            assert client.post("/generate", json={"prompt": "a"}).status_code == 401
        assert client.get("/metrics").status_code == 401
        found = samples(client.get("/metrics", headers=key).text)
    assert labelled(found, "keys_refused_total") == {("invalid_api_key",): 4}
    assert value(found, "requests_total", route="/generate", method="POST", outcome="unauthorized") == 3


def plan(*names: str) -> SteeringPlan:
    return SteeringPlan(tuple(PlanTerm(name, "v", 0.5) for name in names))


def metrics() -> Metrics:
    return Metrics(lambda: Snapshot("1"))


def test_names_of_profiles_that_are_not_served_share_a_series() -> None:
    made = metrics()
    made.serve_profiles(["warm"])
    for name in ("warm", "gone", "never"):
        made.steering(plan(name))
        made.request("/generate", "POST", "success", [name, "also-gone"])
    found = samples(made.exposition().decode())
    assert labelled(found, "steering_strength_count") == {("warm",): 1, (WITHDRAWN,): 2}
    assert labelled(found, "profile_requests_total") == {
        ("warm", "/generate", "success"): 1,
        (WITHDRAWN, "/generate", "success"): 3,
    }


def test_the_number_of_error_codes_is_bounded() -> None:
    made = metrics()
    for number in range(2 * MAX_CODES):
        made.client_error(400, f"code-{number}")
        made.key_refused(f"code-{number}")
    found = labelled(samples(made.exposition().decode()), "client_errors_total")
    assert len(found) == MAX_CODES + 1
    assert found["400", OTHER] == MAX_CODES


def test_a_schedule_counts_with_its_first_strength() -> None:
    made = metrics()
    made.serve_profiles(["warm"])
    schedule = StrengthSchedule(((0, -3.0), (4, 2.0)))
    made.steering(SteeringPlan((PlanTerm("warm", "v", schedule=schedule),)))
    found = samples(made.exposition().decode())
    assert value(found, "steering_strength_bucket", profile="warm", le="-4.0") == 0
    assert value(found, "steering_strength_bucket", profile="warm", le="-3.0") == 1


def test_two_applications_in_a_process_do_not_share_numbers() -> None:
    one, other = metrics(), metrics()
    one.request("/generate", "POST", "success", [])
    assert labelled(samples(one.exposition().decode()), "requests_total")
    assert not labelled(samples(other.exposition().decode()), "requests_total")


def test_every_metric_is_there_before_anything_is_loaded() -> None:
    families = {family.name for family in text_string_to_metric_families(metrics().exposition().decode())}
    assert {f"trimtab_{name}" for name in METRICS} <= families
