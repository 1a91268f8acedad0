"""Traces: a span for a request, under the one that the request names, and the phases of its generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.app import create_app
from server.settings import Settings
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
engine = engine_fixture(slots=2)
profiles = profiles_fixture("warm", unit=0.05)


class Exported:
    """A provider whose spans stay in memory."""

    def __init__(self) -> None:
        self.memory = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.memory))

    def of(self, name: str, count: int) -> list[ReadableSpan]:
        """The spans of the trace whose request has this name, once there are so many."""

        def spans() -> list[ReadableSpan]:
            every = self.memory.get_finished_spans()
            traces = {one.context.trace_id for one in every if one.name == name}
            return [one for one in every if one.context.trace_id in traces]

        until(lambda: len(spans()) == count)
        return spans()


@pytest.fixture
def exported() -> Exported:
    return Exported()


def test_a_request_has_a_span_with_the_phases_of_each_generation(
    engine: Any, profiles: Path, exported: Exported
) -> None:
    body = {"model": "demo", "prompt": "Bread is", "n": 2, "max_tokens": 5, "steering": "warm@0.5", "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    with live_server(engine, profiles, tracer_provider=exported.provider) as client:
        usage = client.post("/v1/completions", json=body, headers=headers).raise_for_status().json()["usage"]
        spans = exported.of("POST /v1/completions", 7)
    *phases, request = spans
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "trimtab.request_id": "mine",
        "trimtab.outcome": "success",
        "trimtab.steering": ("warm@0.5",),
        "gen_ai.usage.input_tokens": 2 * usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
    }
    assert [one.name for one in phases] == ["queue", "prefill", "decode"] * 2
    for one in phases:
        assert one.parent is not None
        assert one.parent.span_id == request.context.span_id
        assert one.attributes is not None
        assert one.attributes["gen_ai.usage.output_tokens"] == 5
    for queue, prefill, decode in (phases[:3], phases[3:]):
        times = [queue.start_time, queue.end_time, prefill.start_time, prefill.end_time, decode.start_time]
        assert sorted(times) == times
        assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
        assert request.start_time <= queue.start_time
        assert decode.start_time < decode.end_time <= request.end_time


def test_without_a_parent_a_request_begins_a_trace(engine: Any, profiles: Path, exported: Exported) -> None:
    with live_server(engine, profiles, tracer_provider=exported.provider) as client:
        client.get("/version", headers={"traceparent": "nonsense"}).raise_for_status()
        (request,) = exported.of("GET /version", 1)
    assert request.parent is None


def test_a_fault_of_the_server_is_an_error_and_a_clients_is_not(
    engine: Any, profiles: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("server.api.profiles.listed", fail)
    with live_server(engine, profiles, tracer_provider=exported.provider) as client:
        assert client.post("/generate", json={"colour": 1}).status_code == 400
        (refused,) = exported.of("POST /generate", 1)
        with httpx.Client(base_url=client.base_url) as other:
            assert other.get("/profiles").status_code == 500
        (failed,) = exported.of("GET /profiles", 1)
    assert refused.status.status_code is StatusCode.UNSET
    assert refused.attributes is not None
    assert refused.attributes["error.type"] in ("missing_field", "unknown_field")
    assert failed.status.status_code is StatusCode.ERROR


def test_an_endpoint_makes_an_exporter() -> None:
    app = create_app(Settings(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
    assert app.state.traces is not None
    app.state.traces.close()
