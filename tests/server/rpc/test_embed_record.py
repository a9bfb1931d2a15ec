"""The replay record in a picture's file, over the wire: what a server writes, the SDK reads."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from darkroom_client import AsyncClient, ReplayRecord
from darkroom_client._types.picture import embedded_text
from darkroom_server.backends.fake_model import fake_flow_model, fake_model
from darkroom_server.core.job import PROMPT_FIELDS
from darkroom_server.core.model import OPTIONAL_FIELDS
from darkroom_server.core.record import MAX_JPEG_PROMPT_BYTES
from darkroom_server.settings import Models
from tests.server.streams import assembled, kind, rest
from tests.server.wire import Wire, refusal, serving

HOLDS_RECORDS = ("PNG", "JPEG", "WEBP")
# XML, JSON and PNG each have characters of their own; a prompt may hold all of them.
PROMPT = 'a <star> & "moon" \\ ★ 🌙 ]]> \x01\x7f\ufffe &amp;'


async def generated(wire: Wire, format: str, **fields: Any) -> Any:
    named = f"IMAGE_FORMAT_{format}"
    reply = await wire.generate(fields.pop("prompt", PROMPT), format=named, **fields)
    return reply.images[0]


@pytest.mark.parametrize("format", HOLDS_RECORDS)
async def test_the_record_in_the_file_is_the_record_of_the_image(
    format: str, tmp_path: Path
) -> None:
    async with serving(fake={"auto": True}) as wire, AsyncClient(wire.server.address) as client:
        result = await client.generate(
            PROMPT,
            negative_prompt="rain",
            seed=7,
            guidance_scale=7.1,
            image_count=2,
            format=format.lower(),
            embed_record=True,
        )
        for image in result.images:
            path = image.save(tmp_path / f"{image.seed}{image.format.suffixes[0]}")
            record = ReplayRecord.from_file(path)
            assert record.differences(image.replay) == {}
            assert record.request == image.replay.request
            assert record.request.prompt == PROMPT
            assert record.request.guidance_scale == 7.1
            assert record.request.quality == (90 if format != "PNG" else None)
            again = (await client.replay(record)).images[0]
            assert again.data == image.data


KEYS_OF_0_1_0 = {
    *("prompt", "model", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed"),
    *("image_count", "scheduler", "format", "quality", "exact"),
}
"""What a client of 0.1.0 knows of a request; another key makes the record invalid there."""


async def test_the_record_in_the_file_has_the_optional_fields(tmp_path: Path) -> None:
    everything = replace(fake_flow_model(), optional_fields=frozenset(OPTIONAL_FIELDS))
    options: dict[str, Any] = {
        "true_cfg_scale": 4.1,
        "guidance_rescale": 0.7,
        "max_sequence_length": 77,
        "prompt_2": "a moon & 🌙",
        "negative_prompt_3": "rain",
        "empty_negative_prompt": True,
        "prompt_syntax": "weighted",
    }
    flow = {"models": [everything], "auto": True}
    async with (
        serving(fake=flow, models=Models(model=("flow=fake",))) as wire,
        AsyncClient(wire.server.address) as client,
    ):
        for sent in (options, {}):
            image = (await client.generate("a star", embed_record=True, **sent)).image
            record = ReplayRecord.from_file(image.save(tmp_path / "flow.png", overwrite=True))
            assert record.differences(image.replay) == {}
            assert record.request == image.replay.request
            request = record.request
            assert request.true_cfg_scale == sent.get("true_cfg_scale", 1.0)
            assert request.prompt_2 == sent.get("prompt_2", "")
            assert request.prompt_syntax == sent.get("prompt_syntax")
            assert request.guidance_scale == 3.5
            assert (await client.replay(record)).image.data == image.data


async def test_a_record_of_a_model_of_0_1_0_has_no_key_that_it_did_not_know() -> None:
    async with serving(fake={"auto": True}) as wire:
        data = (await generated(wire, "PNG", prompt="a star", embed_record=True)).data
    text = embedded_text(data)
    assert text is not None
    assert json.loads(text)["request"].keys() == {*KEYS_OF_0_1_0, "embed_record"}


@pytest.mark.parametrize("denoiser", [False, True])
@pytest.mark.parametrize("vae", [False, True])
async def test_a_record_has_the_layout_of_the_vae_if_it_is_another(
    denoiser: bool, vae: bool, tmp_path: Path
) -> None:
    model = fake_model()
    runtime = replace(model.runtime, channels_last=denoiser, vae_channels_last=vae)
    fake = {"models": [replace(model, runtime=runtime)], "auto": True}
    async with serving(fake=fake) as wire, AsyncClient(wire.server.address) as client:
        shown = (await client.model("demo")).runtime
        assert shown is not None
        assert (shown.channels_last, shown.vae_channels_last) == (denoiser, vae)
        image = (await client.generate("a star", embed_record=True)).image
    record = ReplayRecord.from_file(image.save(tmp_path / "star.png"))
    assert record.differences(image.replay) == {}
    assert record.vae_channels_last == image.replay.vae_channels_last
    assert record.vae_channels_last == (None if vae == denoiser else vae)


async def test_a_record_has_no_guidance_that_the_model_does_not_take() -> None:
    unguided = replace(fake_model(), optional_fields=frozenset({"preview"}))
    async with serving(fake={"models": [unguided], "auto": True}) as wire:
        data = (await generated(wire, "PNG", prompt="a star", embed_record=True)).data
        text = embedded_text(data)
        assert text is not None
        assert ReplayRecord.from_json(text).request.guidance_scale is None
        async with AsyncClient(wire.server.address) as client:
            assert (await client.replay(ReplayRecord.from_json(text))).image.data == data


@pytest.mark.parametrize("format", HOLDS_RECORDS)
async def test_equal_pixels_give_equal_files(format: str) -> None:
    async with serving(fake={"auto": True}) as wire:
        alone = await generated(wire, format, seed=8, embed_record=True)
        named = await generated(wire, format, seed=8, embed_record=True, request_id="mine")
        second = (
            await wire.generate(
                PROMPT, seed=7, image_count=2, format=f"IMAGE_FORMAT_{format}", embed_record=True
            )
        ).images[1]
        streamed = await rest(
            wire.stream(PROMPT, seed=8, format=f"IMAGE_FORMAT_{format}", embed_record=True)
        )
        chunks = [response.event.image for response in streamed if kind(response) == "image"]
        files = [alone.data, named.data, second.data, assembled(chunks)[0]]
        assert len(set(files)) == 1
        other = await generated(wire, format, seed=8, embed_record=True, negative_prompt="rain")
        assert other.data not in files


@pytest.mark.parametrize("format", HOLDS_RECORDS)
async def test_the_pixels_do_not_change_and_nothing_is_embedded_unasked(format: str) -> None:
    async with serving(fake={"auto": True}) as wire:
        plain = await generated(wire, format, seed=7)
        embedded = await generated(wire, format, seed=7, embed_record=True)
        assert b"darkroom" not in plain.data
        assert b"darkroom" in embedded.data
        pixels = [PIL.Image.open(io.BytesIO(each.data)).tobytes() for each in (plain, embedded)]
        assert pixels[0] == pixels[1]
        assert plain.replay.pixels_sha256 == embedded.replay.pixels_sha256


async def test_what_cannot_hold_a_record_is_named() -> None:
    async with serving(fake={"auto": True}) as wire:
        error = await refusal(generated(wire, "RAW_RGB", embed_record=True))
        assert error.violations == {"embed_record": "is for PNG, JPEG and WEBP, not for RAW_RGB"}
        worst = "&" * 8192
        fields: dict[str, Any] = {"negative_prompt": worst, "embed_record": True}
        error = await refusal(generated(wire, "JPEG", prompt=worst, **fields))
        assert error.violations.keys() == {"embed_record"}
        everything = replace(fake_model("all"), optional_fields=frozenset(OPTIONAL_FIELDS))
        many = dict.fromkeys(PROMPT_FIELDS, "&" * 3000)
        assert len("&" * 3000) * 6 * 3 > MAX_JPEG_PROMPT_BYTES > len("&" * 3000) * 6 * 2
        async with serving(
            fake={"models": [everything], "auto": True}, models=Models(model=("all=fake",))
        ) as other:
            error = await refusal(generated(other, "JPEG", embed_record=True, **many))
            assert error.violations.keys() == {"embed_record"}
            two = {name: many[name] for name in ("prompt", "prompt_3")}
            assert (await generated(other, "JPEG", embed_record=True, **two)).data
        for format in ("PNG", "WEBP"):
            assert (await generated(wire, format, prompt=worst, **fields)).data
        longest = {"prompt": "🌙" * 2048, "negative_prompt": "🌙" * 2048}
        assert (await generated(wire, "JPEG", **longest, embed_record=True)).data
