"""Requests as OpenTelemetry spans; imported only if ``--traces`` asks for them."""

import os
import time
from dataclasses import asdict
from threading import Thread

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace import TraceFlags as Flags

from darkroom_server.core.events import StageSeconds
from darkroom_server.service.summary import Outcome, RequestSummary
from darkroom_server.service.trace_context import TraceContext

FLUSH_SECONDS = 5.0
"""To send the remaining spans at shutdown; a collector that is gone must not delay it."""


class _Ids(RandomIdGenerator):
    """Gives a trace that begins here the id that is in the log already."""

    def __init__(self) -> None:
        self.next_trace = 0

    def generate_trace_id(self) -> int:
        return self.next_trace or super().generate_trace_id()


PROTOCOL_ATTRIBUTES = {
    "grpc": {"rpc.system": "grpc"},
    "http": {"network.protocol.name": "http"},
}
"""As OpenTelemetry's conventions name them."""


class SpanWriter:
    """Writes the spans of each request after its end, from the times that were measured anyway."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        self._ids = _Ids()
        name = os.environ.get("OTEL_SERVICE_NAME", "darkroom-server")
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: name}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("darkroom_server")

    def close(self) -> None:
        """Send the remaining spans; blocks for at most ``FLUSH_SECONDS``."""
        # On a daemon thread: the exporter retries for longer than its timeout.
        last = Thread(target=self._provider.shutdown, name="flush-spans", daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)

    def request_ended(self, summary: RequestSummary) -> None:
        """Write one span for the request, with one child for each of its stages."""
        end = time.time_ns()
        start = end - _nanoseconds(summary.seconds)
        parent = self._parent(summary.trace)
        span = self._tracer.start_span(
            "generate", parent, SpanKind.SERVER, _attributes(summary), start_time=start
        )
        if summary.stages is not None:
            self._write_stages(span, start, summary.stages, summary.steps)
        if summary.outcome in (Outcome.FAILED, Outcome.EXPIRED):
            span.set_status(Status(StatusCode.ERROR, summary.reason))
        span.end(end)

    def _parent(self, of: TraceContext | None) -> Context:
        self._ids.next_trace = int(of.trace_id, 16) if of else 0
        if of is None or not of.span_id:
            return Context()
        caller = SpanContext(
            int(of.trace_id, 16),
            int(of.span_id, 16),
            is_remote=True,
            trace_flags=Flags(Flags.SAMPLED if of.sampled else Flags.DEFAULT),
        )
        return trace.set_span_in_context(NonRecordingSpan(caller), Context())

    def _write_stages(self, span: trace.Span, start: int, stages: StageSeconds, steps: int) -> None:
        # One after the other: each begins at the end of the one before.
        below = trace.set_span_in_context(span, Context())
        for stage, seconds in asdict(stages).items():
            attributes = {"darkroom.steps": steps} if stage == "denoise" else None
            child = self._tracer.start_span(stage, below, attributes=attributes, start_time=start)
            start += _nanoseconds(seconds)
            child.end(start)


def _attributes(summary: RequestSummary) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        **PROTOCOL_ATTRIBUTES[summary.protocol],
        "darkroom.request_id": summary.request_id,
        "darkroom.model": summary.model,
        "darkroom.outcome": summary.outcome.value,
        "darkroom.images": summary.images,
        "darkroom.rows": summary.rows,
    }
    if summary.reason:
        found["darkroom.reason"] = str(summary.reason)
    if summary.phase:
        found["darkroom.phase"] = summary.phase
    return found


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
