import asyncio
import subprocess
from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.backends.fake import FLAGGED
from darkroom_server.core.events import (
    AdapterEvicted,
    AdapterLoaded,
    BatchDone,
    Counted,
    DenoiserCompiled,
    EncodeDone,
    EngineCounts,
    EngineReady,
    MemoryReport,
    PeakMeasured,
    RowLimitCorrected,
    SampleBytesCorrected,
    Sensors,
)
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.dispatch import AdapterMemory, EstimateChecked, FirstPreview
from darkroom_server.rpc.models import ModelServicer
from darkroom_server.settings import Engine
from darkroom_server.telemetry import Metrics
from tests.server.telemetry.scrape import counted, scrape, values
from tests.server.wire import SERVING, Wire, refusal, serving


async def mixed_requests(wire: Wire) -> None:
    """Two finished requests, one of them withheld, two invalid ones, and a memory report."""
    await wire.generate(prompt="hippopotamus", image_count=2)
    await wire.generate(prompt=FLAGGED)
    await refusal(wire.generate(prompt=""))
    await refusal(wire.generate(model="secret-model"))
    wire.engine._emit(
        MemoryReport(device="cuda:0", by_kind={"allocated": 5, "free": 7}, host_rss=9)
    )
    await asyncio.sleep(0)


@pytest.mark.needs("promtool")
async def test_promtool_reports_no_problem() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        text = await scrape(wire)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


async def test_requests_and_images_are_counted_by_outcome() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        requests = await counted(wire, "darkroom_request_seconds_count", "model", "outcome")
        assert requests == {
            ("demo", "finished"): 2,
            ("demo", "invalid"): 1,
            ("unknown", "invalid"): 1,
        }
        images = await counted(wire, "darkroom_images_total", "model", "outcome")
        assert images == {("demo", "finished"): 2, ("demo", "flagged"): 1}
        stages = await values(wire, "darkroom_stage_seconds_count", "stage")
        assert stages == dict.fromkeys(
            [("queue",), ("encode_prompt",), ("denoise",), ("decode",), ("encode_image",)], 2
        )


async def test_no_label_holds_text_from_a_caller() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        text = await scrape(wire)
    assert "hippopotamus" not in text
    assert "secret" not in text


async def test_calls_are_counted_by_the_standard_grpc_metrics() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        labels = ("grpc_type", "grpc_service", "grpc_method")
        generate = ("unary", "darkroom.v1.GenerationService", "Generate")
        assert (await values(wire, "grpc_server_started_total", *labels))[generate] == 4
        handled = await values(wire, "grpc_server_handled_total", *labels, "grpc_code")
        assert handled[*generate, "OK"] == 2
        assert handled[*generate, "INVALID_ARGUMENT"] == 1
        assert handled[*generate, "NOT_FOUND"] == 1
        seconds = await values(wire, "grpc_server_handling_seconds_count", *labels)
        assert seconds[generate] == 4
        assert ("server_stream", "grpc.health.v1.Health", "Watch") in seconds


async def test_cancelled_and_expired_calls_have_their_codes() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a star")
        call = wire.generation.Generate(request)
        await wire.submitted.get()
        call.cancel()
        await wire.cancelled.get()
        with pytest.raises(grpc.aio.AioRpcError):
            await wire.generation.Generate(request, timeout=2.0)
        await wire.cancelled.get()
        # The call ends for the caller before its handler ends.
        handled: dict[tuple[str, ...], float] = {}
        while sum(count for (method, _), count in handled.items() if method == "Generate") < 2:
            handled = await values(wire, "grpc_server_handled_total", "grpc_method", "grpc_code")
        assert handled["Generate", "CANCELLED"] == 1
        assert handled["Generate", "DEADLINE_EXCEEDED"] == 1
        outcomes = await counted(wire, "darkroom_request_seconds_count", "outcome")
        assert outcomes["cancelled",] == 1
        assert outcomes["expired",] == 1


async def test_gauges_follow_the_jobs() -> None:
    async with serving(engine=Engine(engine_max_restarts=0)) as wire:
        assert await values(wire, "darkroom_ready") == {(): 1}
        call = wire.generating(steps=2)
        await wire.submitted.get()
        assert await values(wire, "darkroom_jobs_running", "model") == {("demo",): 1}
        assert await values(wire, "darkroom_queue_depth", "model") == {("demo",): 0}
        wire.engine.advance(2)
        await call
        assert await values(wire, "darkroom_jobs_running", "model") == {("demo",): 0}
        assert await values(wire, "darkroom_rows_per_step_sum", "model") == {("demo",): 4}
        assert await values(wire, "darkroom_step_seconds_count", "model", "rows") == {
            ("demo", "2"): 2
        }
        wire.engine.die()
        await wire.health_becomes(2)
        assert await values(wire, "darkroom_ready") == {(): 0}


async def test_memory_and_versions() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        kinds = await values(wire, "darkroom_gpu_memory_bytes", "device", "kind")
        assert kinds == {("cuda:0", "allocated"): 5, ("cuda:0", "free"): 7}
        host = await values(wire, "darkroom_host_memory_bytes", "process")
        assert host["engine",] == 9
        assert host["server",] > 1_000_000
        assert (await values(wire, "darkroom_build_info", "version")) == {("0.1.0",): 1}


async def test_a_status_set_by_a_handler_is_the_one_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def set_status(self: object, request: object, context: Any) -> model_pb2.GetModelResponse:
        context.set_code(grpc.StatusCode.DATA_LOSS)
        return model_pb2.GetModelResponse()

    monkeypatch.setattr(ModelServicer, "GetModel", set_status)
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError):
            await wire.models.GetModel(model_pb2.GetModelRequest())
        handled = await values(wire, "grpc_server_handled_total", "grpc_method", "grpc_code")
    assert handled["GetModel", "DATA_LOSS"] == 1


async def test_cancelled_jobs_are_counted_by_phase() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a star")
        wire.engine._pass_seconds = 0.5
        for batches in (0, 1):
            call = wire.generation.Generate(request)
            await wire.submitted.get()
            wire.engine.advance(batches)
            call.cancel()
            await wire.cancelled.get()
            wire.engine.advance(0)
        cancels: dict[tuple[str, ...], float] = {}
        while sum(cancels.values()) < 2:
            cancels = await values(wire, "darkroom_cancels_total", "phase")
        wasted = await values(wire, "darkroom_wasted_engine_seconds_total", "model")
    assert cancels == {("queue",): 1, ("denoise",): 1, ("decode",): 0}
    assert wasted == {("demo",): 0.5}


async def test_rejections_are_counted_by_reason() -> None:
    async with serving(fake={"auto": True}) as wire:
        await mixed_requests(wire)
        rejections = await counted(wire, "darkroom_rejections_total", "model", "reason")
    assert rejections == {
        ("demo", "invalid_request"): 1,
        ("unknown", "unknown_model"): 1,
    }


async def test_engine_events_are_added_up() -> None:
    async with serving() as wire:
        for _ in range(2):
            wire.engine._emit(
                EngineCounts("demo", {Counted.PROMPTS_CACHED: 2, Counted.OUT_OF_MEMORY_SPLIT: 1})
            )
        for rows, peak in ((3, 100), (4, 70), (0, 50)):
            wire.engine._emit(
                PeakMeasured(model="demo", width=60, height=70, rows=rows, peak_bytes=peak)
            )
        wire.engine._emit(
            BatchDone(
                model="demo",
                width=64,
                height=64,
                rows=4,
                seconds=0.002,
                samples=2,
                joined=1,
                max_rows=8,
            )
        )
        await asyncio.sleep(0)
        lookups = await values(wire, "darkroom_prompt_lookups_total", "result")
        assert lookups == {("hit",): 4, ("miss",): 0}
        splits = await values(wire, "darkroom_out_of_memory_total", "outcome")
        assert splits == {("split",): 2, ("failed",): 0}
        peaks = await values(wire, "darkroom_peak_memory_bytes", "model", "size_class", "rows")
        assert peaks == {("demo", "128", "4"): 100}
        assert await values(wire, "darkroom_decode_peak_memory_bytes") == {(): 50}
        assert await values(wire, "darkroom_occupancy_ratio_sum") == {(): 0.5}
        assert await values(wire, "darkroom_joins_total") == {(): 1}
        assert await values(wire, "darkroom_steps_total") == {(): 2}


async def test_loads_and_sensors_are_gauges() -> None:
    async with serving(fake={"load": False}, wait=False) as wire:
        load = ModelLoad(
            model="demo", load_seconds=1.5, warm_up_seconds=2.5, bytes_by_component={"unet": 7}
        )
        wire.engine._emit(EngineReady(wire.engine.models, 4.0, (load,)))
        sensors = Sensors(utilisation=0.5, power_watts=300.0)
        wire.engine._emit(MemoryReport(device="cuda:0", by_kind={}, host_rss=1, sensors=sensors))
        await wire.health_becomes(SERVING)
        assert await values(wire, "darkroom_model_load_seconds") == {(): 1.5}
        assert await values(wire, "darkroom_max_rows", "model") == {("demo",): 8}
        assert await values(wire, "darkroom_denoiser_compiled", "model") == {("demo",): 0}
        how = ("model", "device", "dtype", "memory_format", "preset", "attention")
        assert await values(wire, "darkroom_model_info", *how) == {
            ("demo", "cpu", "float32", "contiguous", "fast", "sdpa"): 1
        }
        wire.engine._emit(RowLimitCorrected("demo", 16))
        wire.engine._emit(SampleBytesCorrected("demo", 500))
        wire.engine._emit(DenoiserCompiled("demo"))
        encode = EncodeDone(model="demo", prompts=2, seconds=0.25, cache_bytes=1000)
        wire.engine._emit(encode)
        await asyncio.sleep(0)
        assert await values(wire, "darkroom_max_rows", "model") == {("demo",): 16}
        assert await values(wire, "darkroom_denoiser_compiled", "model") == {("demo",): 1}
        assert await values(wire, "darkroom_encode_seconds_sum", "model") == {("demo",): 0.25}
        assert await values(wire, "darkroom_encode_seconds_count") == {(): 1}
        assert await values(wire, "darkroom_bytes_per_sample", "model") == {("demo",): 500}
        assert await values(wire, "darkroom_prompt_cache_bytes", "model") == {("demo",): 1000}
        assert await values(wire, "darkroom_model_warm_up_seconds") == {(): 2.5}
        assert await values(wire, "darkroom_model_memory_bytes", "component") == {("unet",): 7}
        assert await values(wire, "darkroom_gpu_utilisation_ratio", "device") == {("cuda:0",): 0.5}
        assert await values(wire, "darkroom_gpu_power_watts") == {(): 300}
        assert await values(wire, "darkroom_gpu_temperature_celsius") == {}


async def test_messages_are_measured() -> None:
    async with serving(fake={"auto": True}) as wire:
        response = await wire.generate()
        labels = ("grpc_method",)
        sent = await values(wire, "grpc_server_sent_message_bytes_sum", *labels)
        assert sent["Generate",] == response.ByteSize()
        received = await values(wire, "grpc_server_received_message_bytes_sum", *labels)
        assert received["Generate",] == len(b"\x12\x06a star")


async def test_missed_deadlines_are_counted_by_phase() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a star")
        with pytest.raises(grpc.aio.AioRpcError):
            await wire.generation.Generate(request, timeout=2.0)
        misses: dict[tuple[str, ...], float] = {}
        while not sum(misses.values()):
            misses = await values(wire, "darkroom_deadline_misses_total", "phase")
    assert sum(misses.values()) == 1
    assert misses["queue",] + misses["admission",] == 1


async def test_retries_that_join_are_counted() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a star", request_id="mine")
        first = wire.generation.Generate(request)
        await wire.submitted.get()
        again = wire.generation.Generate(request)
        joined: dict[tuple[str, ...], float] = {("demo",): 0}
        while not joined["demo",]:
            joined = await values(wire, "darkroom_retries_joined_total", "model")
        wire.engine.advance(4)
        await first
        await again
        assert joined == {("demo",): 1}
        assert await values(wire, "darkroom_steps_total") == {(): 4}


def test_estimate_errors_and_preview_times_are_observed() -> None:
    metrics = Metrics(["demo"])
    metrics.on_event(EstimateChecked("demo", 2.0, 3.0))
    metrics.on_event(EstimateChecked("demo", 0.0, 3.0))  # There was no estimate.
    metrics.on_event(FirstPreview("demo", 0.25))
    sample = metrics.registry.get_sample_value
    demo = {"model": "demo"}
    assert sample("darkroom_estimate_error_ratio_sum", demo) == 1.5
    assert sample("darkroom_estimate_error_ratio_count", demo) == 1
    assert sample("darkroom_time_to_first_preview_seconds_sum", demo) == 0.25


async def test_counters_do_not_fall_when_an_engine_dies() -> None:
    async with serving() as wire:
        call = wire.generating()
        await wire.submitted.get()
        wire.engine.advance(3)
        wire.engine.die()
        await wire.submitted.get()
        wire.engine.advance(4)
        await call
        assert await values(wire, "darkroom_steps_total") == {(): 7}
        assert await values(wire, "darkroom_engine_restarts_total") == {(): 1}
        assert await values(wire, "darkroom_job_replays_total", "model") == {("demo",): 1}


def test_adapters_are_counted_by_the_names_on_offer() -> None:
    metrics = Metrics(["demo"])
    for event in (
        AdapterLoaded("demo", "pastel", 1000, 0.1),
        AdapterMemory("demo", "pastel", 1000),
        AdapterLoaded("demo", "outline", 500, 0.1),
        AdapterEvicted("demo", "pastel"),
        AdapterMemory("demo", "pastel", 0),
    ):
        metrics.on_event(event)
    batch = BatchDone(model="demo", width=64, height=64, rows=4, seconds=0.1, adapters=2)
    metrics.on_event(batch)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "demo", **labels})

    assert value("darkroom_adapter_loads_total", adapter="pastel") == 1
    assert value("darkroom_adapter_loads_total", adapter="outline") == 1
    assert value("darkroom_adapter_evictions_total", adapter="pastel") == 1
    assert value("darkroom_adapter_bytes", adapter="pastel") == 0
    assert value("darkroom_adapters_per_batch_sum") == 2
    assert value("darkroom_adapters_per_batch_bucket", le="1.0") == 0
    assert value("darkroom_adapters_per_batch_bucket", le="2.0") == 1
