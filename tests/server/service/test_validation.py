import math
from dataclasses import replace
from typing import Any

import grpc
import pytest

from darkroom.v1 import model_pb2, types_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.job import SEED_BOUND
from darkroom_server.core.model import ModelInfo
from tests.server.wire import refusal, serving

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": "é" * 4097}, "prompt", "must be at most 8192 bytes of UTF-8, and has 8194"),
    ({"negative_prompt": "n" * 8193}, "negative_prompt", "must be at most 8192 bytes of UTF-8"),
    ({"width": 0}, "width", "must be 64 to 2048, not 0"),
    ({"width": -8}, "width", "must be 64 to 2048, not -8"),
    ({"width": 2056}, "width", "must be 64 to 2048, not 2056"),
    ({"height": 100}, "height", "must be a multiple of 8, not 100"),
    ({"height": 0}, "height", "must be 64 to 2048"),
    ({"steps": 0}, "steps", "must be 1 to 1000, not 0"),
    ({"steps": 1001}, "steps", "must be 1 to 1000"),
    ({"steps": 51, "scheduler": types_pb2.SCHEDULER_LCM}, "steps", "must be 1 to 50, not 51"),
    ({"steps": 1, "scheduler": types_pb2.SCHEDULER_DPMPP_2M}, "steps", "must be 2 to 1000"),
    ({"guidance_scale": math.nan}, "guidance_scale", "must be 0 to 50, not nan"),
    ({"guidance_scale": math.inf}, "guidance_scale", "must be 0 to 50, not inf"),
    ({"guidance_scale": -0.1}, "guidance_scale", "must be 0 to 50, not -0.1"),
    ({"guidance_scale": 50.1}, "guidance_scale", "must be 0 to 50"),
    ({"seed": -1}, "seed", f"must be 0 to {SEED_BOUND - 1}, not -1"),
    ({"image_count": 0}, "image_count", "must be 1 to 16, not 0"),
    ({"image_count": 17}, "image_count", "must be 1 to 16, not 17"),
    ({"scheduler": 99}, "scheduler", "99 is not a scheduler that this server knows"),
    ({"scheduler": -1}, "scheduler", "-1 is not a scheduler"),
    ({"scheduler": types_pb2.SCHEDULER_DEIS}, "scheduler", "model 'demo' offers ddim, pndm,"),
    ({"format": 99}, "format", "99 is not a format that this server knows"),
    ({"quality": 90}, "quality", "is for JPEG and WEBP only, not for PNG"),
    (
        {"quality": 90, "format": types_pb2.IMAGE_FORMAT_RAW_RGB},
        "quality",
        "is for JPEG and WEBP only, not for RAW_RGB",
    ),
    ({"quality": 0, "format": types_pb2.IMAGE_FORMAT_JPEG}, "quality", "must be 1 to 100"),
    ({"quality": 101, "format": types_pb2.IMAGE_FORMAT_WEBP}, "quality", "must be 1 to 100"),
    ({"true_cfg_scale": 2.0}, "true_cfg_scale", "model 'demo' does not take it; it takes negative"),
    ({"prompt_2": "a moon"}, "prompt_2", "model 'demo' does not take it; it takes negative"),
    ({"empty_negative_prompt": True}, "empty_negative_prompt", "model 'demo' does not take it"),
    ({"request_id": "a b"}, "request_id", "must be at most 64 of A-Z a-z 0-9 . _ -"),
    ({"request_id": "a" * 65}, "request_id", "must be at most 64"),
    ({"request_id": "a\n"}, "request_id", "must be at most 64"),
]


def float8_model(quantization: str = "fp8-dynamic") -> ModelInfo:
    model = fake_model()
    return replace(model, runtime=replace(model.runtime, quantization=quantization))


FLOAT8_WRONG: list[tuple[dict[str, Any], str, str]] = [
    (
        {"exact": True},
        "exact",
        "model 'demo' multiplies in 8-bit floats with scales of each call (--quantize fp8-dynamic)",
    ),
]


@pytest.mark.parametrize("quantization", ["fp8-dynamic", "fp8-dynamic, int8", "fp8", ""])
async def test_exact_is_rejected_where_equal_bytes_are_not_promised(quantization: str) -> None:
    model = float8_model(quantization)
    async with serving(fake={"models": [model], "auto": True}) as wire:
        (image,) = (await wire.generate(seed=7)).images
        assert image.replay.quantization == quantization
        assert not image.replay.request.exact
        if "dynamic" not in quantization:
            assert (await wire.generate(exact=True)).images[0].replay.request.exact
            return
        for fields, name, description in FLOAT8_WRONG:
            error = await refusal(wire.generate(**fields))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.violations.keys() == {name}
            assert description in error.violations[name]


async def test_each_violation_names_its_field_and_the_valid_values() -> None:
    async with serving(fake={"auto": True}) as wire:
        for fields, name, description in WRONG:
            error = await refusal(wire.generate(**fields))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT, fields
            assert error.info.reason == "INVALID_REQUEST"
            assert error.info.domain == "darkroom"
            assert list(error.violations) == [name], fields
            assert error.violations[name].startswith(description), error.violations
        assert wire.submitted.empty()


async def test_all_violations_come_at_once() -> None:
    fields: dict[str, Any] = {
        "prompt": "",
        "negative_prompt": "n" * 9000,
        "width": 7,
        "height": 9000,
        "steps": 0,
        "guidance_scale": math.nan,
        "seed": -1,
        "image_count": 0,
        "scheduler": 99,
        "format": 99,
        "quality": 0,
        "request_id": "?",
    }
    async with serving(fake={"auto": True}) as wire:
        error = await refusal(wire.generate(**fields))
    assert set(error.violations) == set(fields)
    assert "prompt: must not be empty" in error.message


async def test_bounds_are_inclusive() -> None:
    right: list[dict[str, Any]] = [
        {"width": 64, "height": 64, "steps": 1, "guidance_scale": 0.0, "seed": 0},
        {"width": 1024, "guidance_scale": 50.0, "seed": SEED_BOUND - 1, "image_count": 16},
        {"steps": 1000, "request_id": "a" * 64},
        {"prompt": "é" * 4096, "negative_prompt": "n" * 8192},
        {"quality": 1, "format": types_pb2.IMAGE_FORMAT_JPEG},
        {"quality": 100, "format": types_pb2.IMAGE_FORMAT_WEBP},
    ]
    async with serving(fake={"auto": True}) as wire:
        for fields in right:
            assert (await wire.generate(**fields)).images


def odd_model() -> ModelInfo:
    model = fake_model()
    return replace(
        model,
        defaults=replace(model.defaults, steps=60, guidance_scale=7.3),
        limits=replace(model.limits, max_guidance_scale=9.1),
    )


async def test_a_default_that_the_scheduler_rejects_must_be_set() -> None:
    async with serving(fake={"models": [odd_model()], "auto": True}) as wire:
        error = await refusal(wire.generate(scheduler=types_pb2.SCHEDULER_LCM))
        expected = "must be set for lcm, which takes 1 to 50: the model's default is 60"
        assert error.violations == {"steps": expected}
        assert (await wire.generate(scheduler=types_pb2.SCHEDULER_LCM, steps=8)).images


async def test_guidance_is_a_32_bit_float_everywhere() -> None:
    async with serving(fake={"models": [odd_model()], "auto": True}) as wire:
        # 9.1 as a 32-bit float is a little more than 9.1.
        await wire.generate(guidance_scale=9.1)
        reply = await wire.generate()
        await wire.generation.Generate(reply.images[0].replay.request)
        _, first, replayed = [await wire.submitted.get() for _ in range(3)]
    assert first.guidance_scale == replayed.guidance_scale != 7.3


async def test_a_model_that_makes_certain_sizes_only() -> None:
    model = fake_model()
    sizes = ((512, 512), (640, 384), (384, 640))
    model = replace(model, limits=replace(model.limits, sizes=sizes))
    async with serving(fake={"models": [model], "auto": True}) as wire:
        for width, height in sizes:
            assert (await wire.generate(width=width, height=height)).images
        error = await refusal(wire.generate(width=640, height=320))
        assert error.violations == {
            "width": "model 'demo' makes certain sizes only, not 640×320; the one of the nearest "
            "shape is 640×384"
        }
        # What is wrong with one side alone comes first.
        error = await refusal(wire.generate(width=640, height=8))
        assert error.violations == {"height": "must be 64 to 2048, not 8"}
        reply = await wire.models.GetModel(model_pb2.GetModelRequest(model="demo"))
    assert [(size.width, size.height) for size in reply.model.limits.sizes] == list(sizes)
