"""POST /v1/images/edits and /v1/images/variations: forms with pictures."""

import io
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.job import Job, Task
from darkroom_server.http import body as bodies
from tests.server.http.door import Door, door
from tests.server.uploads.pictures import encoded, halves, mask, plain

INK = AdapterOffer(id="ink", rank=4, bytes=500)
IMAGES: dict[str, Any] = {
    "auto": True,
    "models": [replace(fake_image_model(), adapters=(INK,))],
}
PICTURE = ("a.png", plain(), "image/png")


async def post(there: Door, path: str, files: Any, **fields: Any) -> httpx2.Response:
    return await there.client.post(f"/v1/images/{path}", files=files, data=fields)


async def job_of(there: Door, path: str, files: Any, **fields: Any) -> Job:
    reply = await post(there, path, files, **fields)
    assert reply.status_code == 200, reply.text
    return await there.wire.submitted.get()


def transparent_on_the_left() -> bytes:
    """As OpenAI's masks: what is transparent is generated again; colours do not count."""
    image = halves().convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, image.width // 2, image.height))
    image.paste((255, 255, 255, 255), (image.width // 2, 0, *image.size))
    return encoded(image)


async def test_an_edit_starts_from_its_picture() -> None:
    async with door(fake=IMAGES) as there:
        job = await job_of(
            there, "edits", {"image": PICTURE}, prompt="a star", strength="0.5", n="2", seed="7"
        )
        assert job.image is not None
        assert (job.image.width, job.image.height) == (job.width, job.height) == (96, 64)
        assert (job.task, job.strength, job.image_count, job.seed) == (
            Task.IMAGE_TO_IMAGE,
            0.5,
            2,
            7,
        )


async def test_a_mask_says_where() -> None:
    async with door(fake=IMAGES) as there:
        files = {"image": PICTURE, "mask": ("m.png", mask(), "image/png")}
        right = await job_of(there, "edits", files, prompt="a star")
        assert right.task is Task.INPAINT
        files["mask"] = ("m.png", transparent_on_the_left(), "image/png")
        left = await job_of(there, "edits", files, prompt="a star")
    assert right.mask_image is not None
    assert left.mask_image is not None
    assert (right.mask_image.pixels[0], right.mask_image.pixels[95]) == (0, 255)
    assert (left.mask_image.pixels[0], left.mask_image.pixels[95]) == (255, 0)


async def test_several_pictures_are_references() -> None:
    async with door(fake=IMAGES) as there:
        files = [("image[]", PICTURE), ("image[]", PICTURE)]
        job = await job_of(there, "edits", files, prompt="a star")
    assert len(job.reference_images) + (job.image is not None) == 2


async def test_a_variation_needs_no_prompt() -> None:
    async with door(fake=IMAGES) as there:
        job = await job_of(there, "variations", {"image": PICTURE}, size="128x96")
        assert job.task is Task.IMAGE_TO_IMAGE
        assert (job.width, job.height) == (128, 96)
        loras = '[{"id": "ink", "scale": 0.5}]'
        job = await job_of(there, "variations", {"image": PICTURE}, prompt="ink", loras=loras)
        assert [(each.id, each.scale) for each in job.loras] == [("ink", 0.5)]
        unknown = await there.generate(loras=[{"id": "none"}])
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_adapter")
        assert (await there.client.get("/v1/models/demo")).json()["loras"] == ["ink"]
        reply = await there.generate(loras=[{"id": "ink"}])
        assert reply.status_code == 200
        assert (await there.wire.submitted.get()).loras[0].scale == 1.0


async def test_what_is_wrong_with_a_form() -> None:
    async with door(fake=IMAGES) as there:
        reply = await post(there, "edits", {"mask": PICTURE}, prompt="a", n="x", mood="y")
        found = {each["field"] for each in reply.json()["error"]["violations"]}
        assert reply.status_code == 400
        assert {"image", "n", "mood"} <= found
        text = ("a.png", b"no picture", "image/png")
        reply = await post(there, "edits", {"image": text}, prompt="a")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")
        small = ("m.png", mask((8, 8)), "image/png")
        reply = await post(there, "edits", {"image": PICTURE, "mask": small}, prompt="a")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "mask")
        reply = await there.client.post("/v1/images/edits", json={"prompt": "a"})
        assert reply.status_code == 415
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
            reply = await there.client.post(
                "/v1/images/edits", content=b"--y\r\nnonsense", headers={"content-type": kind}
            )
            assert reply.status_code == 400, kind
        many = [("image[]", PICTURE)] * 30
        assert (await post(there, "edits", many, prompt="a")).status_code == 400
        for loras in ("x", "[1]", '[{"id": 3}]', '[{"id": "a", "b": 1}]', "[" * 9999):
            reply = await post(there, "edits", {"image": PICTURE}, prompt="a", loras=loras)
            assert reply.json()["error"]["param"] == "loras", loras
        assert there.wire.submitted.empty()
    async with door() as there:
        reply = await post(there, "edits", {"image": PICTURE}, prompt="a")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")


async def test_a_form_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    async with door(fake=IMAGES) as there:
        large = ("a.png", bytes(33 * 1024**2), "image/png")
        assert (await post(there, "edits", {"image": large}, prompt="a")).status_code == 413
        assert bodies.MAX_RECEIVING_LARGE_PER_CALLER < bodies.MAX_RECEIVING_LARGE


async def test_openai_s_client_edits_and_streams() -> None:
    async with (
        door(fake=IMAGES) as there,
        openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key="unused") as client,
    ):
        first, second = io.BytesIO(plain()), io.BytesIO(mask())
        first.name, second.name = "a.png", "m.png"
        images = await client.images.edit(
            image=first, mask=second, prompt="a star", n=2, model="demo", size="auto"
        )
        assert images.data is not None
        assert len(images.data) == 2
        assert (await there.wire.submitted.get()).task is Task.INPAINT
        stream = await client.images.edit(
            image=[("a.png", plain())], prompt="a star", stream=True, partial_images=1
        )
        types = [event.type async for event in stream]
        assert types[-1] == "image_edit.completed"
        assert set(types) <= {"image_edit.partial_image", "image_edit.completed"}
        with pytest.warns(DeprecationWarning, match="deprecated"):
            varied = await client.images.create_variation(image=("a.png", plain()), n=1)
        assert varied.data is not None
