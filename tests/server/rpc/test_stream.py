"""One stream that tells the whole story."""

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
from tests.server.wire import refusal, serving

AUTO = {"auto": True}


def kind(response: Any) -> str:
    name: str = response.event.WhichOneof("event")
    return name


async def read(call: Any, count: int = 1) -> list[Any]:
    """The next ``count`` events."""
    return [getattr(r.event, kind(r)) for r in [await call.read() for _ in range(count)]]


async def until(call: Any, name: str) -> Any:
    """The next event of that name."""
    while True:
        response = await call.read()
        assert response is not grpc.aio.EOF, f"the stream ended without {name}"
        if kind(response) == name:
            return getattr(response.event, name)


async def rest(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def assembled(chunks: list[Any]) -> dict[int, bytes]:
    """The images that ``chunks`` make; each must be whole, and in one go."""
    images: dict[int, bytes] = {}
    current = -1
    for chunk in chunks:
        if chunk.offset == 0:
            assert chunk.image_index not in images
            assert chunk.image.format
            current = chunk.image_index
            images[current] = b""
        else:
            assert not chunk.HasField("image")
        assert chunk.image_index == current
        assert chunk.offset == len(images[current])
        assert len(chunk.data) <= 512 * 1024
        images[current] += chunk.data
        if len(images[current]) == chunk.size:
            current = -1
    assert current == -1
    return images


async def test_the_story_from_the_queue_to_the_end() -> None:
    async with serving(dispatch=Dispatch(max_resident_samples=1)) as wire:
        first, second = wire.generating("first"), wire.generating("second")
        await wire.submitted.get()
        while wire.server.dispatcher.queued_jobs < 1:
            await asyncio.sleep(0)
        call = wire.stream(seed=2**63 - 1, image_count=2, steps=2, request_id="tale")
        (accepted,) = await read(call)
        assert (accepted.request_id, accepted.model, accepted.joined) == ("tale", "demo", False)
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
        told = await rest(call)
    assert [kind(r) for r in told] == ["progress", "progress", "image", "image", "finished"]
    finished = told[-1].event.finished
    assert finished.reason == generation_pb2.FINISH_REASON_COMPLETED
    assert (finished.model, finished.model_revision) == ("demo", "fake")
    assert finished.timings.total.ToNanoseconds() > 0
    image = told[2].event.image.image
    assert (image.seed, image.width, image.replay.request.prompt) == (2**63 - 1, 64, "a star")


async def test_each_accepted_job_names_the_server_that_has_it() -> None:
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


async def test_a_stream_draws_what_generate_draws() -> None:
    async with serving(fake=AUTO) as wire:
        whole = await wire.generate(seed=5, image_count=3)
        told = await rest(wire.stream(seed=5, image_count=3))
    chunks = [r.event.image for r in told if kind(r) == "image"]
    assert assembled(chunks) == {i: image.data for i, image in enumerate(whole.images)}
    for chunk, image in zip(chunks, whole.images, strict=True):
        image.ClearField("data")
        assert chunk.image == image


def roomy_model() -> Any:
    """A model whose memory fits its largest images."""
    memory = MemoryNeeds(
        pixels=64 * 64, bytes_per_row=1, bytes_per_decode=1, available_bytes=1024**3
    )
    return replace(fake_model(), memory=memory)


async def test_a_large_image_comes_in_pieces() -> None:
    async with serving(fake={"auto": True, "models": [roomy_model()]}) as wire:
        call = wire.stream(
            width=2048,
            height=2048,
            image_count=2,
            seed=1,
            format=types_pb2.IMAGE_FORMAT_RAW_RGB,
        )
        told = await rest(call)
        job = await wire.submitted.get()
    # No message is near gRPC's default limit, though the reply would be three times as large.
    assert max(r.ByteSize() for r in told) < 1024**2
    images = assembled([r.event.image for r in told if kind(r) == "image"])
    assert images == {index: fake_image(job, index).data for index in range(2)}
    assert len(images[0]) == 2048 * 2048 * 3


async def test_previews_come_every_so_many_steps() -> None:
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
        # None after the last step: the image comes itself.
        assert (await until(call, "preview")).step == 4
        await until(call, "finished")


async def test_withheld_images_are_told_without_data() -> None:
    async with serving(fake=AUTO) as wire:
        told = await rest(wire.stream("[flagged]"))
    (chunk,) = [r.event.image for r in told if kind(r) == "image"]
    assert (chunk.image.flagged, chunk.size, chunk.data) == (True, 0, b"")
    assert told[-1].event.finished.reason == generation_pb2.FINISH_REASON_WITHHELD


async def test_a_crash_is_told_and_the_images_come_all_the_same() -> None:
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


async def test_errors_are_the_streams_status() -> None:
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
async def test_a_reader_that_leaves_frees_the_job(how: str) -> None:
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


async def test_readers_that_never_read_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_module, "STALL_SECONDS", 2.0)
    none_kept = Results(result_bytes=0)
    room = Dispatch(max_resident_samples=100)
    fake = {"models": [roomy_model()]}
    async with serving(fake=fake, results=none_kept, dispatch=room) as wire:
        size: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 1000}
        raw = types_pb2.IMAGE_FORMAT_RAW_RGB
        stuck = [wire.stream(preview_every=1, format=raw, **size) for _ in range(4)]
        ids = [(await wire.submitted.get()).id for _ in stuck]
        jobs = [weakref.ref(wire.server.dispatcher._registry.get(id)) for id in ids]
        for _ in range(999):
            wire.engine.advance()
            await asyncio.sleep(0)
        for job in jobs:
            for waiter in job()._subscriptions:  # type: ignore[union-attr]
                # However much there was to tell, no more is waiting than one of each kind.
                assert len(waiter._unread) <= 3
        # Others are served, and those who read get all that was drawn.
        other = wire.stream(steps=1)
        await wire.submitted.get()
        wire.engine.advance()
        assert kind((await rest(other))[-1]) == "finished"
        # The stuck ones are finished too, and their images, 12 MB each, are let go of.
        await wire.becomes(lambda: gc.collect() >= 0 and not any(job() for job in jobs))
        for call in stuck:
            call.cancel()
        assert wire.server.dispatcher.counts.by_end == {JobOutcome.FINISHED: 5}
