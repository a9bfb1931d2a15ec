"""Images over the wire: uploads, jobs that start from them, and what happens in between."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from darkroom.v1 import generation_pb2, image_pb2, image_pb2_grpc, types_pb2
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job, Task
from darkroom_server.dispatch.estimation.batch_times import Group as BatchGroup
from darkroom_server.rpc import images as images_module
from darkroom_server.service import uploads as uploads_module
from darkroom_server.settings import Images, Security
from tests.server.security.test_tokens import bearing, entry
from tests.server.streams import rest
from tests.server.telemetry.scrape import counted
from tests.server.uploads.pictures import (
    BLUE,
    DAMAGED,
    NOT_PICTURES,
    RED,
    SIZE,
    TOO_LARGE,
    encoded,
    halves,
    mask,
    plain,
)
from tests.server.wire import Wire, refusal, serving

RAW = types_pb2.IMAGE_FORMAT_RAW_RGB


def wired(*, auto: bool = True, **options: Any) -> Any:
    return serving(fake={"models": [fake_image_model()], "auto": auto}, **options)


def data(picture: bytes) -> image_pb2.ImageInput:
    return image_pb2.ImageInput(data=picture)


def named(upload_id: str) -> image_pb2.ImageInput:
    return image_pb2.ImageInput(upload_id=upload_id)


async def parts(chunks: Iterable[bytes]) -> AsyncIterator[image_pb2.UploadImageRequest]:
    for chunk in chunks:
        yield image_pb2.UploadImageRequest(chunk=chunk)


async def upload(
    wire: Wire, picture: bytes, *, chunk: int = 100, metadata: Any = None
) -> image_pb2.UploadImageResponse:
    stub: Any = image_pb2_grpc.ImageServiceStub(wire.channel)
    chunks = [picture[at : at + chunk] for at in range(0, len(picture), chunk)]
    reply: image_pb2.UploadImageResponse = await stub.UploadImage(parts(chunks), metadata=metadata)
    return reply


async def pixels(reply: Any) -> Any:
    (image,) = reply.images
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


def array(image: InputImage | None) -> Any:
    assert image is not None
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, -1)


async def test_a_job_gets_every_picture_decoded() -> None:
    async with wired() as wire:
        await wire.generate(
            width=64,
            height=64,
            image=data(plain(RED)),
            mask_image=data(mask()),
            strength=0.5,
            reference_images=[data(plain(BLUE, (40, 30))), data(plain(RED, (30, 40)))],
            controls=[generation_pb2.Control(id="pose", image=data(plain(BLUE)), scale=0.5)],
            loras=[generation_pb2.Lora(id="outline", scale=0.5)],
            ip_adapter_image=data(plain(RED, (9, 9))),
            ip_adapter_scale=0.25,
        )
        job = wire.submitted.get_nowait()
    assert (job.task, job.strength, job.ip_adapter_scale) == (Task.INPAINT, 0.5, 0.25)
    assert array(job.image).shape == (64, 64, 3)
    assert set(array(job.mask_image).flatten()) == {0, 255}
    assert array(job.mask_image).shape == (64, 64, 1)
    assert [array(each).shape for each in job.reference_images] == [(30, 40, 3), (40, 30, 3)]
    assert tuple(array(job.reference_images[0])[0, 0]) == BLUE
    (control,) = job.controls
    assert (control.id, control.scale, control.start, control.end) == ("pose", 0.5, 0.0, 1.0)
    assert tuple(array(control.image)[0, 0]) == BLUE
    assert array(control.image).shape == (64, 64, 3)
    assert array(job.ip_adapter_image).shape == (9, 9, 3)
    assert [(lora.id, lora.scale) for lora in job.loras] == [("outline", 0.5)]


async def test_the_size_is_that_of_the_image() -> None:
    async with wired() as wire:
        reply = await wire.generate(image=data(plain(size=(333, 222))), format=RAW)
        assert (reply.images[0].width, reply.images[0].height) == (336, 224)
        reply = await wire.generate(image=data(plain(size=(300, 200))), height=64, format=RAW)
        assert (reply.images[0].width, reply.images[0].height) == (96, 64)
        # Without an image to start from, it is the model's.
        control = generation_pb2.Control(id="pose", image=data(plain(size=(300, 200))))
        reply = await wire.generate(controls=[control], format=RAW)
        assert (reply.images[0].width, reply.images[0].height) == (64, 64)


async def test_an_edit_has_the_shape_of_its_first_reference_image() -> None:
    async with wired() as wire:
        images = [data(plain(size=(400, 100))), data(plain(size=(100, 400)))]
        image = (await wire.generate(reference_images=images, format=RAW)).images[0]
        # About the 64×64 pixels of the model's default size, but no side below its least.
        assert (image.width, image.height) == (128, 64)
        job = wire.submitted.get_nowait()
        # Each reference image costs the denoiser as much as an image of the default size.
        assert job.reference_pixels == 2 * 64 * 64
        assert job.denoised_size == (181, 91)
        model = fake_image_model()
        plain_job = replace(job, reference_pixels=0)
        assert model.needed_bytes(job) > model.needed_bytes(plain_job) > 0
        assert BatchGroup.of(job).pixels == pytest.approx(2 * BatchGroup.of(plain_job).pixels, 0.01)
        reply = await wire.generate(reference_images=images[::-1], width=64, format=RAW)
        assert (reply.images[0].width, reply.images[0].height) == (64, 256)
        reply = await wire.generate(reference_images=images, width=64, height=64, format=RAW)
        assert (reply.images[0].width, reply.images[0].height) == (64, 64)
        long = data(plain(size=(900, 100)))
        error = await refusal(wire.generate(reference_images=[images[0], long]))
        assert error.violations == {
            "reference_images[1]": "must not be more than 8 times as long as wide, and is 900×100"
        }


async def test_strength_has_a_default_and_is_recorded() -> None:
    async with wired() as wire:
        reply = await wire.generate(image=data(plain(RED)), seed=3, format=RAW)
        record = reply.images[0].replay.request
        assert record.strength == pytest.approx(0.8)
        await wire.generate(seed=3)
        assert not (await wire.generate()).images[0].replay.request.HasField("strength")


async def test_an_upload_is_an_image_of_its_caller() -> None:
    async with wired() as wire:
        picture = plain(RED)
        uploaded = await upload(wire, picture)
        assert uploaded.upload_id.startswith("sha256:")
        assert (uploaded.width, uploaded.height) == SIZE
        assert uploaded.expires_in.seconds == 3600
        by_id = await wire.generate(image=named(uploaded.upload_id), seed=3, format=RAW)
        by_data = await wire.generate(image=data(picture), seed=3, format=RAW)
        assert by_id.images[0].data == by_data.images[0].data
        assert by_id.images[0].replay.request.image == named(uploaded.upload_id)
        assert by_data.images[0].replay.request.image == named(uploaded.upload_id)
        assert await upload(wire, picture, chunk=10_000) == uploaded


async def test_a_record_generates_the_same_image() -> None:
    async with wired() as wire:
        for picture in (encoded(halves()), mask()):
            await upload(wire, picture)
        first = await wire.generate(
            image=data(encoded(halves())), mask_image=data(mask()), seed=9, format=RAW
        )
        record = first.images[0].replay.request
        again = await wire.generation.Generate(record)
        assert again.images[0].data == first.images[0].data
        other = generation_pb2.GenerateRequest()
        other.CopyFrom(record)
        other.image.CopyFrom(data(plain(BLUE)))
        assert (await wire.generation.Generate(other)).images[0].data != first.images[0].data


async def test_an_unknown_upload_is_a_failed_precondition() -> None:
    async with wired() as wire:
        uploaded = (await upload(wire, plain(RED))).upload_id
        unknown = ["sha256:" + letter * 64 for letter in "ab"]
        error = await refusal(
            wire.generate(
                image=named(unknown[0]), reference_images=map(named, [uploaded, *unknown])
            )
        )
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.info.reason == "UPLOAD_NOT_FOUND"
        assert error.info.metadata["upload_ids"] == ",".join(unknown)
        estimate = generation_pb2.EstimateGenerationRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star", image=named(unknown[0]))
        )
        error = await refusal(wire.generation.EstimateGeneration(estimate))
        assert error.info.reason == "UPLOAD_NOT_FOUND"
        assert wire.submitted.empty()


async def test_bad_images_are_invalid_and_their_fields_are_named() -> None:
    async with wired() as wire:
        for name, picture in {**NOT_PICTURES, **DAMAGED, **TOO_LARGE}.items():
            error = await refusal(wire.generate(image=data(picture)))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT, name
            assert error.violations.keys() == {"image"}
        bad = data(NOT_PICTURES["svg"])
        error = await refusal(
            wire.generate(
                image=data(plain()),
                mask_image=data(mask((90, 64))),
                reference_images=[data(plain()), bad],
                controls=[generation_pb2.Control(id="pose", image=bad)],
                ip_adapter_image=bad,
            )
        )
        assert error.violations == {
            "mask_image": "must have the size of image, 96×64, and has 90×64",
            "reference_images[1]": "is not a PNG, JPEG or WebP picture",
            "controls[0].image": "is not a PNG, JPEG or WebP picture",
            "ip_adapter_image": "is not a PNG, JPEG or WebP picture",
        }
        assert wire.submitted.empty()
        assert (await wire.generate(image=data(plain()))).images


async def test_nothing_is_decoded_for_a_request_that_is_invalid_anyway() -> None:
    async with wired() as wire:
        error = await refusal(wire.generate(image=data(NOT_PICTURES["svg"]), steps=0))
        assert error.violations.keys() == {"steps"}
        assert wire.server.decoder.pids == []


@pytest.mark.parametrize("name", [*NOT_PICTURES, *DAMAGED, *TOO_LARGE, "empty"])
async def test_a_bad_upload_is_invalid(name: str) -> None:
    pictures = {**NOT_PICTURES, **DAMAGED, **TOO_LARGE, "empty": b""}
    async with wired() as wire:
        error = await refusal(upload(wire, pictures[name], chunk=5000))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations.keys() == {"chunk"}


async def test_chunks_and_files_are_limited() -> None:
    images = Images(upload_bytes_per_caller=2 * 1024**2)
    async with wired(images=images) as wire:
        error = await refusal(upload(wire, bytes(600_000), chunk=512 * 1024 + 1))
        assert error.violations == {"chunk": "must be at most 524288 bytes, and has 524289"}
        error = await refusal(upload(wire, bytes(3 * 1024**2), chunk=512 * 1024))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "DOES_NOT_FIT"
        assert error.trailers["grpc-retry-pushback-ms"] == "-1"


@pytest.fixture
def tokens(tmp_path: Path) -> Security:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "alice-1") + entry("bob", "bob-1"))
    return Security(tokens=str(path), insecure=True)


async def test_one_callers_uploads_are_not_seen_by_another(tokens: Security) -> None:
    async with wired(security=tokens) as wire:
        uploaded = await upload(wire, plain(RED), metadata=bearing("alice-1"))
        request = generation_pb2.GenerateRequest(
            prompt="a star", image=named(uploaded.upload_id), format=RAW
        )
        error = await refusal(wire.generation.Generate(request, metadata=bearing("bob-1")))
        assert error.info.reason == "UPLOAD_NOT_FOUND"
        mine = await wire.generation.Generate(request, metadata=bearing("alice-1"))
        # Bob's own upload of the same file has the same name.
        again = await upload(wire, plain(RED), metadata=bearing("bob-1"))
        assert again.upload_id == uploaded.upload_id
        request.seed = mine.images[0].seed
        his = await wire.generation.Generate(request, metadata=bearing("bob-1"))
        assert his.images[0].data == mine.images[0].data


async def test_an_upload_without_a_token_is_rejected_before_it_arrives(tokens: Security) -> None:
    async with wired(security=tokens) as wire:
        error = await refusal(upload(wire, plain(RED)))
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
        assert await counted(wire, "darkroom_uploads_total", "outcome") == {}


async def test_an_upload_that_stalls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "CHUNK_SECONDS", 0.2)
    async with wired() as wire:
        stub: Any = image_pb2_grpc.ImageServiceStub(wire.channel)
        call = stub.UploadImage()
        await call.write(image_pb2.UploadImageRequest(chunk=plain(RED)))
        error = await refusal(call)
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await counted(wire, "darkroom_uploads_total", "outcome") == {("failed",): 1}


async def test_uploads_at_once_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "MAX_UPLOADS_PER_CALLER", 2)
    async with wired() as wire:
        stub: Any = image_pb2_grpc.ImageServiceStub(wire.channel)
        calls = [stub.UploadImage() for _ in range(2)]
        for call in calls:
            await call.write(image_pb2.UploadImageRequest(chunk=plain(RED)))
        third = await refusal_of_third(wire)
        assert third.info.reason == "QUOTA_EXCEEDED"
        for call in calls:
            await call.done_writing()
        first, second = [await call for call in calls]
        assert first == second
        calls = [stub.UploadImage() for _ in range(2)]
        for call in calls:
            await call.write(image_pb2.UploadImageRequest(chunk=plain(RED)))
            call.cancel()
        assert (await upload_when_free(wire)) == first


async def refusal_of_third(wire: Wire) -> Any:
    """The refusal of an upload, once the two before it have their places."""
    async with asyncio.timeout(60):
        while True:
            try:
                await upload(wire, plain(BLUE))
            except grpc.aio.AioRpcError:
                return await refusal(upload(wire, plain(BLUE)))


async def upload_when_free(wire: Wire) -> Any:
    async with asyncio.timeout(60):
        while True:
            try:
                return await upload(wire, plain(RED))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise


async def test_a_job_keeps_its_images_after_they_are_evicted() -> None:
    """Evicted while its job queues: the right picture."""
    picture = encoded(halves((300, 200)))
    images = Images(upload_bytes_per_caller=len(picture))
    async with wired(auto=False, images=images) as wire:
        uploaded = (await upload(wire, picture)).upload_id
        running = wire.generating(
            image=named(uploaded), strength=0.5, seed=3, format=RAW, request_id="first"
        )
        job = await wire.submitted.get()
        await upload(wire, plain(BLUE))  # Evicts it.
        error = await refusal(wire.generate(image=named(uploaded)))
        assert error.info.reason == "UPLOAD_NOT_FOUND"
        # A call that joins needs no image at all.
        joined = wire.generating(
            image=named(uploaded), strength=0.5, seed=3, format=RAW, request_id="first"
        )
        await wire.subscribers("first", 2)
        wire.engine.advance(job.steps)
        shown = await pixels(await running)
        assert (await joined).images[0].data == shown.tobytes()
        assert wire.submitted.empty()
    async with wired() as wire:
        wanted = await wire.generate(image=data(picture), strength=0.5, seed=3, format=RAW)
        assert wanted.images[0].data == shown.tobytes()


async def test_an_engine_that_restarts_gets_the_images_again() -> None:
    async with wired(auto=False) as wire:
        running = wire.generating(
            image=data(encoded(halves())), mask_image=data(mask()), seed=3, format=RAW
        )
        first = await wire.submitted.get()
        wire.engine.advance(2)
        wire.engine.die()
        again = await wire.submitted.get()
        assert (again.image, again.mask_image) == (first.image, first.mask_image)
        wire.engine.advance(again.steps)
        shown = await pixels(await running)
        assert tuple(shown[10, 10]) == RED  # Black in the mask.
        assert tuple(shown[10, 90]) != BLUE


async def test_the_images_of_accepted_jobs_are_bounded() -> None:
    each = 64 * 64 * 3
    async with wired(auto=False, images=Images(input_bytes=2 * each)) as wire:
        sent = {"image": data(plain()), "width": 64, "height": 64}
        running = [wire.generating(**sent) for _ in range(2)]
        jobs = [await wire.submitted.get() for _ in range(2)]
        error = await refusal(wire.generate(**sent))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "QUEUE_FULL"
        assert "grpc-retry-pushback-ms" in error.trailers
        error = await refusal(wire.generate(image=data(plain()), width=128, height=128))
        assert error.info.reason == "DOES_NOT_FIT"
        wire.engine.fail(jobs[0].id, Failure(Reason.ENGINE_FAILED, "broken"))
        await refusal(running[0])
        accepted = wire.generating(**sent)
        await wire.submitted.get()
        wire.engine.advance(4)
        await asyncio.gather(running[1], accepted)


async def test_a_job_that_ended_holds_no_pixels() -> None:
    async with wired() as wire:
        await wire.generate(image=data(plain()), reference_images=[data(plain())], request_id="a")
        job: Job = wire.server.results.find("anybody", "a").job
        assert [picture.pixels for picture in job.pictures] == [b"", b""]
        sent = wire.submitted.get_nowait()
        assert replace(job, deadline=None) == replace(sent.without_pixels(), deadline=None)


async def test_a_second_call_that_waited_meanwhile_joins() -> None:
    async with wired(auto=False) as wire:
        sent = {"image": data(plain()), "request_id": "same", "seed": 3}
        both = [wire.generating(**sent) for _ in range(2)]
        job = await wire.submitted.get()
        await wire.subscribers("same", 2)
        wire.engine.advance(job.steps)
        first, second = await asyncio.gather(*both)
        assert first.images[0].data == second.images[0].data
        assert wire.submitted.empty()


async def test_a_stream_and_a_submitted_job_take_images() -> None:
    async with wired() as wire:
        assert await rest(wire.stream(image=data(plain())))
        generation = generation_pb2.GenerateRequest(prompt="a star", image=data(plain()))
        await wire.generation.SubmitGeneration(
            generation_pb2.SubmitGenerationRequest(generation=generation)
        )
        jobs = [wire.submitted.get_nowait() for _ in range(2)]
        assert [job.task for job in jobs] == [Task.IMAGE_TO_IMAGE] * 2


async def test_a_killed_worker_is_an_internal_error() -> None:
    async with wired() as wire:
        await wire.generate(image=data(plain()))
        (pid,) = wire.server.decoder.pids
        os.kill(pid, signal.SIGSTOP)  # So that it cannot answer before it is killed.
        running = wire.generating(image=data(plain()))
        await wire.becomes(lambda: wire.server.decoder.busy == 1)
        os.kill(pid, signal.SIGKILL)
        error = await refusal(running)
        assert error.code is grpc.StatusCode.INTERNAL
        assert error.message == "the process that decodes images was killed"
        assert (await wire.generate(image=data(plain()))).images
        failures = await counted(wire, "darkroom_input_decode_failures_total", "reason")
        assert failures == {("worker_died",): 1}


async def test_the_metrics_count_uploads_and_failures() -> None:
    red, blue, svg = plain(RED), plain(BLUE, (300, 300)), NOT_PICTURES["svg"]
    async with wired(images=Images(upload_bytes_per_caller=len(blue))) as wire:
        for picture in (red, red, blue):
            await upload(wire, picture)
        await refusal(upload(wire, svg))
        await refusal(wire.generate(image=data(DAMAGED["webp header"])))
        assert await counted(wire, "darkroom_uploads_total", "outcome") == {
            ("stored",): 2,
            ("known",): 1,
            ("invalid",): 1,
        }
        received = await counted(wire, "darkroom_upload_received_bytes_total", "outcome")
        assert received == {
            ("stored",): len(red) + len(blue),
            ("known",): len(red),
            ("invalid",): len(svg),
        }
        failures = await counted(wire, "darkroom_input_decode_failures_total", "reason")
        assert failures == {("not_a_picture",): 1, ("damaged",): 1}
        assert await counted(wire, "darkroom_upload_stored_bytes") == {(): len(blue)}
        assert await counted(wire, "darkroom_upload_evictions_total") == {(): 1}
