"""The replay record in a picture's file, over the wire: what a server writes, the SDK reads."""

import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from darkroom_client import AsyncClient, ReplayRecord
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
        for format in ("PNG", "WEBP"):
            assert (await generated(wire, format, prompt=worst, **fields)).data
        longest = {"prompt": "🌙" * 2048, "negative_prompt": "🌙" * 2048}
        assert (await generated(wire, "JPEG", **longest, embed_record=True)).data
