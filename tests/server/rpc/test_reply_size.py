import io
import random

import grpc
import pytest
from PIL import Image

from darkroom.v1 import generation_pb2
from darkroom_server.core.job import ImageFormat
from darkroom_server.service.validation import OVERHEAD_BYTES, reply_bytes
from tests.server.jobs import make_job
from tests.server.wire import refusal, serving

# At 512 pixels, six images exceed the 4 MiB that a client receives by default.
LARGE = generation_pb2.GenerateRequest(prompt="a star", width=512, height=512, image_count=6)


async def test_a_reply_too_large_for_the_client_is_rejected_before_any_work() -> None:
    async with serving(fake={"auto": True}) as wire:
        error = await refusal(wire.generation.Generate(LARGE))
        assert wire.submitted.empty()
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.info.reason == "REPLY_TOO_LARGE"
    assert "raise the client's gRPC receive limit" in error.violations["image_count"]


async def test_a_client_can_announce_its_receive_limit() -> None:
    async with serving(fake={"auto": True}) as wire:
        metadata = (("darkroom-max-reply-bytes", "64000000"),)
        assert len((await wire.generation.Generate(LARGE, metadata=metadata)).images) == 6
        few = (("darkroom-max-reply-bytes", "100"),)
        small = generation_pb2.GenerateRequest(prompt="a star")
        error = await refusal(wire.generation.Generate(small, metadata=few))
        assert error.info.reason == "REPLY_TOO_LARGE"


async def test_the_announced_limit_cannot_exceed_the_servers() -> None:
    large = generation_pb2.GenerateRequest(prompt="a star", width=2048, height=2048, image_count=6)
    async with serving(fake={"auto": True}) as wire:
        metadata = (("darkroom-max-reply-bytes", str(10**12)),)
        error = await refusal(wire.generation.Generate(large, metadata=metadata))
        assert wire.submitted.empty()
    assert error.info.reason == "REPLY_TOO_LARGE"
    assert "no reply has more than 67108864" in error.violations["image_count"]


@pytest.mark.parametrize("text", ["", "-1", "1e6", "much", "9" * 19])
async def test_the_announced_limit_must_be_a_number(text: str) -> None:
    async with serving(fake={"auto": True}) as wire:
        metadata = (("darkroom-max-reply-bytes", text),)
        error = await refusal(wire.generation.Generate(LARGE, metadata=metadata))
    assert set(error.violations) == {"darkroom-max-reply-bytes"}


def test_no_format_exceeds_the_size_bound() -> None:
    """Noise at the highest quality is the worst case for an encoder."""
    size = 256
    noise = Image.frombytes("RGB", (size, size), random.Random(1).randbytes(size * size * 3))
    bound = reply_bytes(make_job(width=size, height=size)) - OVERHEAD_BYTES // 2
    for format in (ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP):
        buffer = io.BytesIO()
        noise.save(buffer, format.name, quality=100, compress_level=1)
        assert len(buffer.getvalue()) < bound, format
