"""Images and adapters of a request: what is rejected before any image is decoded."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_server.backends.fake_model import fake_image_model, fake_model
from darkroom_server.core.job import Task
from darkroom_server.core.model import OPTIONAL_FIELDS
from darkroom_server.rpc.requests import generation_request
from darkroom_server.service.idempotency import fingerprint
from darkroom_server.service.request import INPUT_FIELDS
from tests.server.wire import refusal, serving

PICTURE = b"not decoded by these tests"
DIGEST = "sha256:" + hashlib.sha256(PICTURE).hexdigest()
IMAGE = image_pb2.ImageInput(data=PICTURE)
LORA = generation_pb2.Lora(id="outline")
CONTROL = generation_pb2.Control(id="pose", image=IMAGE)

SET: dict[str, Any] = {
    "image": image_pb2.ImageInput(),
    "mask_image": image_pb2.ImageInput(),
    "strength": 0.0,
    "reference_images": [IMAGE],
    "loras": [LORA],
    "controls": [CONTROL],
    "ip_adapter_image": image_pb2.ImageInput(),
    "ip_adapter_scale": 0.0,
}
"""Each field of ``Inputs`` with a value that counts as set."""


def control(**fields: Any) -> generation_pb2.Control:
    return generation_pb2.Control(**{"id": "pose", "image": IMAGE, **fields})


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"image": image_pb2.ImageInput()}, "image", "must have data or an upload_id"),
    ({"image": image_pb2.ImageInput(data=b"")}, "image.data", "must be the bytes of a picture"),
    ({"image": image_pb2.ImageInput(upload_id="x")}, "image.upload_id", "must be what Upload"),
    ({"image": image_pb2.ImageInput(upload_id=DIGEST + "0")}, "image.upload_id", "must be what"),
    ({"mask_image": IMAGE}, "mask_image", "needs image"),
    ({"strength": 0.5}, "strength", "needs image"),
    ({"image": IMAGE, "strength": 0.0}, "strength", "must be above 0, to 1, not 0"),
    ({"image": IMAGE, "strength": 1.1}, "strength", "must be above 0, to 1, not 1.1"),
    ({"image": IMAGE, "strength": math.nan}, "strength", "must be above 0, to 1, not nan"),
    ({"image": IMAGE, "strength": 0.2, "steps": 4}, "strength", "of 4 steps, 0.2 is less than one"),
    ({"reference_images": [IMAGE] * 5}, "reference_images", "must be at most 4, and there are 5"),
    (
        {"reference_images": [IMAGE, image_pb2.ImageInput()]},
        "reference_images[1]",
        "must have data or",
    ),
    (
        {"loras": [generation_pb2.Lora(id=str(i)) for i in range(5)]},
        "loras",
        "must be at most 4, and there are 5",
    ),
    ({"loras": [LORA, LORA]}, "loras[1].id", "'outline' is there twice"),
    ({"loras": [generation_pb2.Lora()]}, "loras[0].id", "must not be empty"),
    (
        {"loras": [generation_pb2.Lora(id="a", scale=4.5)]},
        "loras[0].scale",
        "must be -4 to 4, not 4.5",
    ),
    (
        {"loras": [generation_pb2.Lora(id="a", scale=math.inf)]},
        "loras[0].scale",
        "must be -4 to 4, not inf",
    ),
    ({"controls": [CONTROL] * 5}, "controls", "must be at most 4, and there are 5"),
    ({"controls": [generation_pb2.Control(id="pose")]}, "controls[0].image", "must be set"),
    ({"controls": [control(id="")]}, "controls[0].id", "must not be empty"),
    ({"controls": [control(scale=2.5)]}, "controls[0].scale", "must be 0 to 2, not 2.5"),
    ({"controls": [control(start=-0.1)]}, "controls[0].start", "must be 0 to 1, not -0.1"),
    (
        {"controls": [control(start=0.5, end=0.5)]},
        "controls[0].end",
        "must be above start (0.5), to 1, not 0.5",
    ),
    ({"controls": [control(end=1.5)]}, "controls[0].end", "must be above start (0), to 1"),
    ({"ip_adapter_scale": 0.5}, "ip_adapter_scale", "needs ip_adapter_image"),
    (
        {"ip_adapter_image": IMAGE, "ip_adapter_scale": 1.5},
        "ip_adapter_scale",
        "must be 0 to 1, not 1.5",
    ),
]
"""The request's fields, the violation's field and the beginning of its description."""


def test_the_table_has_every_input_field() -> None:
    assert set(SET) == set(INPUT_FIELDS) < set(OPTIONAL_FIELDS)


async def test_each_violation_names_its_field() -> None:
    async with serving(fake={"models": [fake_image_model()], "auto": True}) as wire:
        for sent, name, description in WRONG:
            error = await refusal(wire.generate(**sent))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT, sent
            (violation,) = error.detail(error_details_pb2.BadRequest).field_violations
            assert violation.field == name, violation
            assert violation.description.startswith(description), violation
        assert wire.submitted.empty()


async def test_all_violations_come_at_once() -> None:
    async with serving(fake={"models": [fake_image_model()], "auto": True}) as wire:
        error = await refusal(
            wire.generate(
                steps=0,
                mask_image=image_pb2.ImageInput(),
                strength=2.0,
                loras=[LORA, LORA],
                controls=[control(scale=-1.0)],
                ip_adapter_scale=2.0,
            )
        )
        assert error.violations.keys() == {
            "steps",
            "mask_image",
            "strength",
            "loras[1].id",
            "controls[0].scale",
            "ip_adapter_scale",
        }


@pytest.mark.parametrize("name", SET)
async def test_a_field_that_the_model_does_not_take_is_rejected(name: str) -> None:
    takes = frozenset(OPTIONAL_FIELDS) - {name}
    model = replace(fake_image_model(), optional_fields=takes)
    for served in (fake_model(), model):
        async with serving(fake={"models": [served], "auto": True}) as wire:
            error = await refusal(wire.generate(**{name: SET[name]}))
            assert error.violations[name].startswith("model 'demo' does not take it; it takes ")


async def test_a_task_that_the_model_does_not_offer_is_rejected() -> None:
    edits = replace(fake_image_model(), tasks=(Task.EDIT,))
    async with serving(fake={"models": [edits], "auto": True}) as wire:
        wrong: list[tuple[dict[str, Any], str, str]] = [
            ({}, "image", "text_to_image"),
            ({"image": IMAGE}, "image", "image_to_image"),
            ({"image": IMAGE, "mask_image": IMAGE}, "mask_image", "inpaint"),
        ]
        for sent, name, task in wrong:
            error = await refusal(wire.generate(**sent))
            assert error.violations == {name: f"model 'demo' offers edit, not {task}"}


def test_an_upload_and_the_same_bytes_are_the_same_job() -> None:
    def of(**fields: Any) -> bytes:
        return fingerprint(generation_request(generation_pb2.GenerateRequest(**fields)))

    uploaded = image_pb2.ImageInput(upload_id=DIGEST)
    assert of(image=IMAGE) == of(image=uploaded)
    assert of(controls=[CONTROL]) == of(controls=[control(image=uploaded)])
    other = image_pb2.ImageInput(data=PICTURE + b".")
    assert len({of(), of(image=IMAGE), of(image=other), of(ip_adapter_image=IMAGE)}) == 4
    assert of(image=IMAGE, mask_image=other) != of(image=other, mask_image=IMAGE)
    assert of(loras=[LORA]) == of(loras=[generation_pb2.Lora(id="outline", scale=1.0)])
    assert of(loras=[LORA]) != of(loras=[generation_pb2.Lora(id="outline", scale=0.5)])
