"""Rejections and estimates through the real wire, with their details decoded."""

import asyncio
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.settings import Dispatch, Security
from tests.server.telemetry.scrape import counted
from tests.server.wire import Wire, refusal, serving

SPEED = ModelSpeed(passes=((2, 1.0), (4, 1.5), (8, 2.5)), decode=0.5)
TIMED: dict[str, Any] = {"models": [replace(fake_model(), speed=SPEED)]}


def request(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt="a star", **fields)


async def estimate(wire: Wire, **fields: Any) -> Any:
    estimate_request = generation_pb2.EstimateGenerationRequest(generation=request(**fields))
    return await wire.generation.EstimateGeneration(estimate_request)


async def test_an_unreachable_deadline_is_rejected_with_the_estimate() -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(fake=TIMED) as wire:
            error = await refusal(wire.generation.Generate(request(steps=400), timeout=60))
            images = await counted(wire, "darkroom_images_total", "outcome")
            rejections = await counted(wire, "darkroom_rejections_total", "reason")
    assert images == {("refused",): 1}
    assert rejections == {("deadline_unreachable",): 1}
    (line,) = [line for line in logs if line["event"] == "request"]
    assert (line["outcome"], line["reason"]) == ("refused", "DEADLINE_UNREACHABLE")
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.info.reason == "DEADLINE_UNREACHABLE"
    figures = {key: float(value) for key, value in error.info.metadata.items()}
    assert figures["estimate_seconds"] == pytest.approx(400.5)
    assert figures["queue_wait_seconds"] == 0.0
    assert figures["run_seconds"] == pytest.approx(400.5)
    assert 0 < figures["remaining_seconds"] <= 61 < figures["needed_seconds"]
    assert "about 400.50 s" in error.message
    assert wire.server.dispatcher.counts.accepted == 0


async def test_a_full_queue_says_when_to_try_again() -> None:
    limits = Dispatch(max_queued_jobs=0, max_resident_samples=1)
    async with serving(fake=TIMED, dispatch=limits) as wire:
        first = wire.generating(steps=4)
        await wire.submitted.get()
        error = await refusal(wire.generate())
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "QUEUE_FULL"
        assert error.trailers["grpc-retry-pushback-ms"] == "5000"
        assert error.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 5
        wire.engine.advance(4)
        await first


async def test_a_queue_that_is_full_by_work() -> None:
    limits = Dispatch(max_queued_megapixel_steps=1e-3, max_resident_samples=1)
    async with serving(fake=TIMED, dispatch=limits) as wire:
        running = wire.generating()
        await wire.submitted.get()
        waiting = aiter(
            wire.generation.GenerateStream(
                generation_pb2.GenerateStreamRequest(generation=request())
            )
        )
        assert (await anext(waiting)).event.HasField("accepted")
        error = await refusal(wire.generate())
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "megapixel-steps" in error.message
        assert error.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        wire.engine.advance(4)
        await running
        await wire.submitted.get()
        wire.engine.advance(4)
        events = [response.event.WhichOneof("event") async for response in waiting]
    assert events[-1] == "finished"


@pytest.mark.parametrize(
    ("limit", "message"),
    [("max_jobs = 1", "wait until one has ended"), ("jobs_per_minute = 1", "try again in")],
)
async def test_a_callers_quotas(limit: str, message: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n{more}\n'
            for name, more in (("greedy", limit + "\npriority = 3"), ("other", ""))
        )
    )
    async with serving(fake=TIMED, security=Security(tokens=str(tokens))) as wire:

        def generate(name: str) -> Any:
            metadata = (("authorization", f"Bearer {name}"),)
            return wire.generation.Generate(request(), metadata=metadata)

        first = generate("greedy")
        job = await wire.submitted.get()
        assert (job.caller, job.priority) == ("greedy", 3)
        error = await refusal(generate("greedy"))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "QUOTA_EXCEEDED"
        assert message in error.message
        (violation,) = error.detail(error_details_pb2.QuotaFailure).violations
        assert violation.subject == "caller:greedy"
        assert error.trailers["grpc-retry-pushback-ms"] == "-1"
        second = generate("other")
        await wire.submitted.get()
        wire.engine.advance(4)
        await asyncio.gather(first, second)


async def test_an_estimate_generates_nothing() -> None:
    async with serving(fake=TIMED) as wire:
        alone = await estimate(wire, steps=4, width=128, height=128)
        several = await estimate(wire, steps=4, image_count=16)
        call = wire.generating(steps=4)
        await wire.submitted.get()
        together = await estimate(wire, steps=4)
        assert wire.server.dispatcher.counts.accepted == 1
        wire.engine.advance(4)
        await call
    assert alone.queue_wait.ToMilliseconds() == 0
    assert alone.run_time.ToMilliseconds() == pytest.approx(4 * 2500 + 2000)
    memory = fake_model().memory
    assert alone.peak_bytes == memory.needed(128, 128, 2)
    limits = fake_model().limits
    assert several.peak_bytes == memory.needed(64, 64, min(32, limits.max_rows))
    assert alone.available_bytes == memory.available_bytes
    # It joins at the next step, half a batch away on average.
    assert together.queue_wait.ToMilliseconds() == 500
    assert together.run_time.ToMilliseconds() >= 4 * 1500


async def test_estimates_are_validated_like_requests() -> None:
    async with serving(fake=TIMED) as wire:
        wrong = await refusal(estimate(wire, width=7, steps=-1))
        assert set(wrong.violations) == {"width", "steps"}
        large = await refusal(estimate(wire, width=2048, height=2048))
        assert large.info.reason == "DOES_NOT_FIT"
        unknown = await refusal(estimate(wire, model="other"))
        assert unknown.code is grpc.StatusCode.NOT_FOUND


async def test_an_unmeasured_engine_gives_no_times() -> None:
    async with serving() as wire:
        reported = await estimate(wire)
    assert not reported.HasField("queue_wait")
    assert not reported.HasField("run_time")
    assert reported.peak_bytes > 0


async def test_a_stream_begins_with_the_estimate() -> None:
    async with serving(fake=TIMED) as wire:
        call = wire.generation.GenerateStream(
            generation_pb2.GenerateStreamRequest(generation=request(steps=4))
        )
        events = aiter(call)
        accepted = (await anext(events)).event.accepted
        await wire.submitted.get()
        wire.engine.advance(4)
        async for _ in events:
            pass
    assert accepted.estimated_start.ToMilliseconds() == 0
    assert 3500 < accepted.estimated_finish.ToMilliseconds() <= 4500
