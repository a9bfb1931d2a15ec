"""GenerateStream: every event of a job, in order, in one stream."""

import asyncio
import gc
import io
import socket
import weakref
from dataclasses import replace
from typing import Any

import grpc
import pytest
from PIL import Image

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_server.backends.fake import fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.dispatch import JobOutcome
from darkroom_server.dispatch.jobs import subscription as subscription_module
from darkroom_server.settings import Dispatch, Network, Results
from tests.server.streams import assembled, kind, read, rest, until
from tests.server.wire import refusal, serving

AUTO = {"auto": True}


async def test_the_events_from_the_queue_to_the_end() -> None:
    async with serving(dispatch=Dispatch(max_resident_samples=1)) as wire:
        first, second = wire.generating("first"), wire.generating("second")
        await wire.submitted.get()
        while wire.server.dispatcher.queued_jobs < 1:
            await asyncio.sleep(0)
        call = wire.stream(seed=2**63 - 1, image_count=2, steps=2, request_id="r-1")
        (accepted,) = await read(call)
        assert (accepted.request_id, accepted.model, accepted.joined) == ("r-1", "demo", False)
        assert accepted.model_revision == "fake"
        assert list(accepted.seeds) == [2**63 - 1, 0]
        assert accepted.queue_position == 1
        assert (await until(call, "queued")).position == 1
        wire.engine.advance(4)
        await wire.submitted.get()
        assert (await until(call, "queued")).position == 0
        wire.engine.advance(4)
        await asyncio.gather(first, second)
        await wire.submitted.get()
        wire.engine.advance(1)
        await until(call, "started")
        progress = await read(call, 2)
        assert [(p.image_index, p.step, p.steps, p.rows) for p in progress] == [
            (0, 1, 2, 4),
            (1, 1, 2, 4),
        ]
        wire.engine.advance(1)
        events = await rest(call)
    assert [kind(r) for r in events] == ["progress", "progress", "image", "image", "finished"]
    finished = events[-1].event.finished
    assert finished.reason == generation_pb2.FINISH_REASON_COMPLETED
    assert (finished.model, finished.model_revision) == ("demo", "fake")
    assert finished.timings.total.ToNanoseconds() > 0
    image = events[2].event.image.image
    assert (image.seed, image.width, image.replay.request.prompt) == (2**63 - 1, 64, "a star")


async def test_each_accepted_event_names_the_server_of_the_job() -> None:
    async with serving(fake=AUTO) as wire:
        port = wire.server.address.rpartition(":")[2]
        (accepted,) = await read(wire.stream(request_id="r-1"))
        request = generation_pb2.SubmitGenerationRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star", request_id="r-2")
        )
        submitted = (await wire.generation.SubmitGeneration(request)).accepted
        watch = wire.generation.WatchGeneration(
            generation_pb2.WatchGenerationRequest(request_id="r-2")
        )
        (watched,) = await read(watch)
    names = {message.server_id for message in (accepted, submitted, watched)}
    assert names == {f"{socket.gethostname()}:{port}"}

    async with serving(
        fake=AUTO, network=Network(port=0, metrics_port=0, server_id="gpu-7:50051")
    ) as wire:
        (accepted,) = await read(wire.stream())
    assert accepted.server_id == "gpu-7:50051"


async def test_a_stream_generates_the_same_image_as_generate() -> None:
    async with serving(fake=AUTO) as wire:
        reply = await wire.generate(seed=5, image_count=3)
        events = await rest(wire.stream(seed=5, image_count=3))
    chunks = [r.event.image for r in events if kind(r) == "image"]
    assert assembled(chunks) == {i: image.data for i, image in enumerate(reply.images)}
    for chunk, image in zip(chunks, reply.images, strict=True):
        image.ClearField("data")
        assert chunk.image == image


def roomy_model() -> Any:
    """A model whose memory fits its largest images."""
    memory = MemoryNeeds(
        pixels=64 * 64, bytes_per_row=1, bytes_per_decode=1, available_bytes=1024**3
    )
    return replace(fake_model(), memory=memory)


async def test_a_large_image_comes_in_chunks() -> None:
    async with serving(fake={"auto": True, "models": [roomy_model()]}) as wire:
        call = wire.stream(
            width=2048,
            height=2048,
            image_count=2,
            seed=1,
            format=types_pb2.IMAGE_FORMAT_RAW_RGB,
        )
        events = await rest(call)
        job = await wire.submitted.get()
    # No message is near gRPC's default limit, though the reply would be three times as large.
    assert max(r.ByteSize() for r in events) < 1024**2
    images = assembled([r.event.image for r in events if kind(r) == "image"])
    assert images == {index: fake_image(job, index, fake_model(), 2).data for index in range(2)}
    assert len(images[0]) == 2048 * 2048 * 3


async def test_previews_come_at_the_requested_interval() -> None:
    async with serving() as wire:
        call = wire.stream(steps=6, preview_every=2)
        await wire.submitted.get()
        wire.engine.advance(2)
        preview = await until(call, "preview")
        assert (preview.image_index, preview.step) == (0, 2)
        assert preview.format == types_pb2.IMAGE_FORMAT_JPEG
        picture = Image.open(io.BytesIO(preview.data))
        assert picture.size == (preview.width, preview.height) == (64, 64)
        wire.engine.advance(4)
        # There is no preview after the last step: the image itself comes.
        assert (await until(call, "preview")).step == 4
        await until(call, "finished")


async def test_withheld_images_are_sent_without_data() -> None:
    async with serving(fake=AUTO) as wire:
        events = await rest(wire.stream("[flagged]"))
    (chunk,) = [r.event.image for r in events if kind(r) == "image"]
    assert (chunk.image.flagged, chunk.size, chunk.data) == (True, 0, b"")
    assert events[-1].event.finished.reason == generation_pb2.FINISH_REASON_WITHHELD


async def test_a_crash_sends_restarted_and_then_the_images() -> None:
    async with serving() as wire:
        call = wire.stream(image_count=2, steps=4, seed=3)
        job = await wire.submitted.get()
        wire.engine.advance(2)
        wire.engine.deliver(job.id, 0)
        await until(call, "started")
        wire.engine.die()
        assert (await until(call, "restarted")).crashes == 1
        again = await wire.submitted.get()
        assert again.image_indices == [1]
        wire.engine.advance(4)
        assert (await until(call, "progress")).image_index == 1
        assert (await until(call, "image")).image.seed == 4
        await until(call, "finished")


async def test_an_error_is_the_status_of_the_stream() -> None:
    async with serving() as wire:
        invalid = await refusal(rest(wire.stream("", steps=0, preview_every=-1)))
        assert invalid.code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(invalid.violations) == {"prompt", "steps", "preview.every_steps"}
        call = wire.stream()
        job = await wire.submitted.get()
        wire.engine.fail(job.id, Failure(Reason.NON_FINITE, "not a number"))
        failed = await refusal(rest(call))
    assert failed.code is grpc.StatusCode.INTERNAL
    assert (failed.info.reason, failed.message) == ("NON_FINITE", "not a number")


async def test_a_preview_must_be_small() -> None:
    async with serving(fake=AUTO) as wire:
        request = generation_pb2.GenerateStreamRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star"),
            preview=generation_pb2.PreviewOptions(every_steps=1, format=types_pb2.IMAGE_FORMAT_PNG),
        )
        error = await refusal(rest(wire.generation.GenerateStream(request)))
    assert set(error.violations) == {"preview.format"}


@pytest.mark.parametrize("how", ["cancel", "lost connection"])
async def test_a_call_that_ends_early_cancels_the_job(how: str) -> None:
    async with serving() as wire, grpc.aio.insecure_channel(wire.server.address) as channel:
        request = generation_pb2.GenerateStreamRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star", steps=1000)
        )
        call = type(wire.generation)(channel).GenerateStream(request)
        other = wire.generating("other")
        jobs = {job.prompt: job.id for job in [await wire.submitted.get() for _ in range(2)]}
        wire.engine.advance()
        await until(call, "progress")
        if how == "cancel":
            call.cancel()
        else:
            await channel.close()
        assert await wire.cancelled.get() == jobs["a star"]
        wire.engine.advance(4)
        await other
        assert wire.server.dispatcher.counts.by_end == {
            JobOutcome.CANCELLED: 1,
            JobOutcome.FINISHED: 1,
        }


async def test_stalled_readers_do_not_affect_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_module, "STALL_SECONDS", 2.0)
    none_kept = Results(result_bytes=0)
    room = Dispatch(max_resident_samples=100)
    fake = {"models": [roomy_model()]}
    async with serving(fake=fake, results=none_kept, dispatch=room) as wire:
        size: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 1000}
        raw = types_pb2.IMAGE_FORMAT_RAW_RGB
        stalled = [wire.stream(preview_every=1, format=raw, **size) for _ in range(4)]
        ids = [(await wire.submitted.get()).id for _ in stalled]
        jobs = [weakref.ref(wire.server.dispatcher._registry.get(id)) for id in ids]
        for _ in range(999):
            wire.engine.advance()
            await asyncio.sleep(0)
        for job in jobs:
            for subscription in job()._subscriptions:  # type: ignore[union-attr]
                # At most one event of each kind is unread, however many there were.
                assert len(subscription._unread) <= 3
        # Other calls are served, and a caller that reads gets the whole result.
        other = wire.stream(steps=1)
        await wire.submitted.get()
        wire.engine.advance()
        assert kind((await rest(other))[-1]) == "finished"
        # The stalled jobs finish too, and their images, 12 MB each, are released.
        await wire.becomes(lambda: gc.collect() >= 0 and not any(job() for job in jobs))
        for call in stalled:
            call.cancel()
        assert wire.server.dispatcher.counts.by_end == {JobOutcome.FINISHED: 5}
