"""OpenTelemetry traces: a span for each request, and for each of its generations the phases queue, prefill and decode.

The SDK comes with the extra `otel` and is imported only if traces are wanted. Phases are written when a generation has
ended, from the times that the engine reports, so that nothing is done for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from server.engines.protocol import Finished
from server.observability.request_record import RequestRecord
from server.settings import ConfigurationError
from steering_vectors.profiles.files import installed_version

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

NANOSECONDS = 1_000_000_000
PROPAGATED = ("traceparent", "tracestate")


def exporting_traces(endpoint: str) -> Traces:
    """Traces that are sent to this URL in batches. Raises ConfigurationError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider as Provider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install 'trimtab[otel]', or leave it out"
        ) from error
    resource = Resource.create({SERVICE_NAME: "trimtab", SERVICE_VERSION: installed_version()})
    provider = Provider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Traces(provider, close=provider.shutdown)


class Traces:
    """The traces of one application. `close` sends what has not been sent."""

    def __init__(self, provider: TracerProvider, *, close: Callable[[], None] = lambda: None) -> None:
        self.close = close
        self._tracer = provider.get_tracer("trimtab", installed_version())

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> Span:
        """Start the span of a request, as a child of the one that the request names."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in PROPAGATED if name in headers}
        parent = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(record.method, parent, SpanKind.SERVER, start_time=record.began_ns)
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        return span

    def end(self, record: RequestRecord, span: Span) -> None:
        """End the span of a request, with the phases of its generations."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        span.update_name(f"{record.method} {record.route}")
        span.set_attributes(_attributes(record))
        if record.outcome in ("server_error", "stream_failed", "timeout"):
            span.set_status(Status(StatusCode.ERROR, record.code))
        inside = set_span_in_context(span)
        for finished, ended in record.times:
            self._phases(finished, ended, inside)
        span.end()

    def _phases(self, finished: Finished, ended: int, inside: Any) -> None:
        if finished.times is None:
            return
        times = finished.times
        seconds = {"queue": times.queue, "prefill": times.prefill, "decode": times.decode}
        start = ended - round(NANOSECONDS * sum(seconds.values()))
        for phase, length in seconds.items():
            end = start + round(NANOSECONDS * length)
            attributes = {
                "gen_ai.response.id": finished.id,
                "gen_ai.response.finish_reasons": [finished.reason],
                "gen_ai.usage.input_tokens": finished.prompt_tokens,
                "gen_ai.usage.output_tokens": finished.completion_tokens,
            }
            self._tracer.start_span(phase, inside, attributes=attributes, start_time=start).end(end)
            start = end


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """In OpenTelemetry's names where it has one."""
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "trimtab.request_id": record.id,
        "trimtab.outcome": record.outcome,
    }
    if record.code is not None:
        found["error.type"] = record.code
    if record.generations:
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
        found["gen_ai.usage.output_tokens"] = record.completion_tokens
        found["trimtab.steering"] = record.steering
    return found
