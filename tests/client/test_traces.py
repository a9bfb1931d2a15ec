"""The caller's OpenTelemetry span goes with each call."""

import subprocess
import sys
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from darkroom_client.testing import FakeServer
from tests.client.scripted import ScriptedServer

TRACER = TracerProvider().get_tracer(__name__)
OTHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def parent_of(span: trace.Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def test_the_current_span_is_sent_with_each_call(client: Any, server: ScriptedServer) -> None:
    client.generate("a star")
    with TRACER.start_as_current_span("outer") as outer:
        client.generate("a star")
        with TRACER.start_as_current_span("inner") as inner:
            client.models()
            client.generate("a star", metadata={"traceparent": OTHER})
    client.generate("a star")

    sent = [metadata.get("traceparent") for metadata in server.metadata]
    assert sent == [None, parent_of(outer), parent_of(inner), OTHER, None]


def test_an_unsampled_span_says_so(client: Any, server: ScriptedServer) -> None:
    context = trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(0))
    with trace.use_span(trace.NonRecordingSpan(context)):
        client.generate("a star")

    assert server.metadata[0]["traceparent"] == f"00-{1:032x}-{2:016x}-00"


def test_a_program_without_a_span_does_not_import_opentelemetry(fake: FakeServer) -> None:
    code = (
        "import sys; from darkroom_client import Client\n"
        f"with Client({fake.target!r}) as client: client.generate('a star')\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
