"""Requests as OpenTelemetry's spans; imported only where ``--traces`` asks for them."""

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
from darkroom_server.rpc.summary import Outcome, RequestSummary
from darkroom_server.rpc.trace_context import TraceContext

FLUSH_SECONDS = 5.0
"""For what is left when the server stops; a collector that is gone must not hold it up."""


class _Ids(RandomIdGenerator):
    """Gives a trace that begins here the id that the log knows already."""

    def __init__(self) -> None:
        self.next_trace = 0

    def generate_trace_id(self) -> int:
        return self.next_trace or super().generate_trace_id()


class SpanWriter:
    """Writes the spans of each request once it has ended, from the times that were taken anyway."""

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
        """Send what is left; blocks for ``FLUSH_SECONDS`` at most."""
        # On a thread to walk away from: the exporter tries again for longer than it is told.
        last = Thread(target=self._provider.shutdown, name="flush-spans", daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)

    def request_ended(self, summary: RequestSummary) -> None:
        """Write one span for the request, and one below it for each of its stages."""
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
        # One after the other, as they were: each begins where the one before it was cut off.
        below = trace.set_span_in_context(span, Context())
        for stage, seconds in asdict(stages).items():
            attributes = {"darkroom.steps": steps} if stage == "denoise" else None
            child = self._tracer.start_span(stage, below, attributes=attributes, start_time=start)
            start += _nanoseconds(seconds)
            child.end(start)


def _attributes(summary: RequestSummary) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "rpc.system": "grpc",
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
