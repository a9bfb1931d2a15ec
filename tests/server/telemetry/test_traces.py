import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from darkroom.v1 import generation_pb2
from darkroom_server import app
from darkroom_server.core.errors import Failure, Reason, StartupError
from darkroom_server.telemetry import open_traces, spans
from darkroom_server.telemetry.spans import SpanWriter
from tests.server.http.door import door
from tests.server.telemetry.scrape import OPENMETRICS, scrape
from tests.server.wire import Wire, serving

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
STAGES = ["queue", "encode_prompt", "denoise", "decode", "encode_image"]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Keeps the spans of servers that are made in the test."""
    exporter = InMemorySpanExporter()
    writer = SpanWriter(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app, "open_traces", lambda _: writer)
    yield exporter
    writer.close()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def trace_id(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}"


async def generate(wire: Wire, traceparent: str) -> Any:
    return await wire.generation.Generate(
        generation_pb2.GenerateRequest(prompt="hippopotamus", request_id="mine"),
        metadata=(("traceparent", traceparent),),
    )


async def test_the_stages_are_spans_in_the_caller_s_trace(exporter: InMemorySpanExporter) -> None:
    async with serving(fake={"auto": True}) as wire:
        await generate(wire, f"00-{TRACE}-{SPAN}-01")
    found = by_name(exporter)
    assert set(found) == {"generate", *STAGES}
    root = found["generate"]
    assert root.kind is SpanKind.SERVER
    assert root.parent is not None
    assert (root.parent.trace_id, root.parent.span_id) == (int(TRACE, 16), int(SPAN, 16))
    assert dict(root.attributes or {})["darkroom.request_id"] == "mine"
    assert dict(root.attributes or {})["rpc.system"] == "grpc"
    assert "hippopotamus" not in root.to_json()
    for stage in STAGES:
        assert found[stage].parent == root.get_span_context()
    assert dict(found["denoise"].attributes or {}) == {"darkroom.steps": 4}
    for before, after in pairwise(STAGES):
        assert found[before].end_time == found[after].start_time
    assert found["queue"].start_time == root.start_time


async def test_a_request_over_http_has_the_same_spans(exporter: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "Idempotency-Key": "mine"}
    async with door(fake={"auto": True}) as there:
        assert (await there.generate("hippopotamus", headers=headers)).status_code == 200
    found = by_name(exporter)
    assert set(found) == {"generate", *STAGES}
    root = found["generate"]
    assert root.parent is not None
    assert (root.parent.trace_id, root.parent.span_id) == (int(TRACE, 16), int(SPAN, 16))
    attributes = dict(root.attributes or {})
    assert attributes["darkroom.request_id"] == "mine"
    assert attributes["network.protocol.name"] == "http"
    assert "rpc.system" not in attributes


async def test_a_trace_that_the_caller_does_not_sample_has_no_spans(
    exporter: InMemorySpanExporter,
) -> None:
    async with serving(fake={"auto": True}) as wire:
        await generate(wire, f"00-{TRACE}-{SPAN}-00")
    assert exporter.get_finished_spans() == ()


async def test_without_a_caller_s_trace_a_new_one_begins_and_is_logged(
    exporter: InMemorySpanExporter,
) -> None:
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as logs:
        async with serving(fake={"auto": True}) as wire:
            await wire.generate()
            await wire.generate()
    lines = [line for line in logs if line["event"] == "request"]
    roots = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    logged = [line["trace_id"] for line in lines]
    assert logged == [trace_id(root) for root in roots]
    assert len(set(logged)) == 2
    assert all(root.parent is None for root in roots)
    assert all(line["request_id"] for line in lines)


async def test_the_span_of_a_failed_request_has_its_reason(exporter: InMemorySpanExporter) -> None:
    async with serving() as wire:
        call = wire.generating()
        job = await wire.submitted.get()
        wire.engine.advance()
        wire.engine.fail(job.id, Failure(Reason.OUT_OF_MEMORY, "too large"))
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    span = by_name(exporter)["generate"]
    assert (span.attributes or {})["darkroom.phase"] == "denoise"
    status = span.status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "OUT_OF_MEMORY")


async def test_the_trace_id_is_an_exemplar() -> None:
    async with serving(fake={"auto": True}) as wire:
        await generate(wire, f"00-{TRACE}-{SPAN}-01")
        text = await scrape(wire, OPENMETRICS)
        assert TRACE not in await scrape(wire)
    (line,) = [line for line in text.splitlines() if TRACE in line]
    assert line.startswith('darkroom_request_seconds_bucket{le="')
    assert f'# {{trace_id="{TRACE}"}} ' in line


def test_a_collector_that_hangs_does_not_block_the_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "FLUSH_SECONDS", 0.05)
    collector = threading.Event()

    class Stuck(InMemorySpanExporter):
        def shutdown(self) -> None:
            collector.wait()

    SpanWriter(SimpleSpanProcessor(Stuck())).close()
    assert not collector.is_set()
    collector.set()


def test_opentelemetry_is_not_imported_when_traces_are_off() -> None:
    code = (
        "import sys; from darkroom_server import app, telemetry; "
        "assert telemetry.open_traces('off') is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_error_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "darkroom_server.telemetry.spans", None)
    with pytest.raises(StartupError, match=r"darkroom-server\[otel\]"):
        open_traces("otlp")


async def test_one_log_line_summarises_a_request_without_its_prompt() -> None:
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as logs:
        async with serving(fake={"auto": True}) as wire:
            await generate(wire, f"00-{TRACE}-{SPAN}-01")
    (line,) = [line for line in logs if line["event"] == "request"]
    assert line["request_id"] == "mine"
    assert line["trace_id"] == TRACE
    assert (line["outcome"], line["rows"], line["steps"]) == ("finished", 2, 4)
    assert list(line["stages"]) == STAGES
    assert "hippopotamus" not in str(logs)
