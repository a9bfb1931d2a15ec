"""What becomes of a picture: colours, transparency, orientation, size, masks."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import PIL.Image
import PIL.ImageOps
import pytest

from darkroom_server.core.errors import InvalidRequest
from darkroom_server.uploads.decoder_pool import Decoded, DecoderPool, Fit
from darkroom_server.uploads.fit import Bounds, own_size
from tests.server.uploads.fuzz import peak_bytes
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
    png,
    webp_header,
)

BOUNDS = Bounds(least=64, most=512, multiple=8)
SAME = Fit(kind="cover", bounds=BOUNDS, width=SIZE[0], height=SIZE[1])


@pytest.fixture
async def decoder() -> AsyncIterator[DecoderPool]:
    made = DecoderPool(workers=2, max_pixels=64_000_000, timeout=60.0)
    yield made
    await made.close()


async def shown(decoder: DecoderPool, data: bytes, fit: Fit = SAME) -> Any:
    """The decoded picture as Pillow's image."""
    found = await decoder.decode("a", "image", data, fit)
    mode = "L" if found.channels == 1 else "RGB"
    return PIL.Image.frombytes(mode, (found.width, found.height), found.pixels)


async def rejected(decoder: DecoderPool, data: bytes, fit: Fit = SAME) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await decoder.decode("a", "image", data, fit)
    (violation,) = caught.value.violations
    assert violation.field == "image"
    return violation.description


def near(color: Any, wanted: Any, by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(color, wanted, strict=True))


async def test_colors_of_every_mode(decoder: DecoderPool) -> None:
    half = PIL.Image.new("RGBA", SIZE, (0, 0, 0, 128))
    palette = PIL.Image.new("RGB", SIZE, RED).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    clear = PIL.Image.new("P", SIZE, 0)
    clear.putpalette([*RED, *BLUE])
    cases: dict[str, tuple[bytes, tuple[int, int, int]]] = {
        "rgb": (plain(RED), RED),
        "jpeg": (plain(RED, format="JPEG"), RED),
        "webp": (encoded(PIL.Image.new("RGB", SIZE, RED), "WEBP", lossless=True), RED),
        "gray": (encoded(PIL.Image.new("L", SIZE, 70)), (70, 70, 70)),
        "bits": (encoded(PIL.Image.new("1", SIZE, 1)), (255, 255, 255)),
        "palette": (encoded(palette), RED),
        "16 bits": (encoded(PIL.Image.new("I;16", SIZE, 200 * 256 + 17)), (200, 200, 200)),
        "16 bits rgb": (
            png(
                *SIZE, (b"\0" + bytes([9, 1, 99, 2, 199, 3]) * SIZE[0]) * SIZE[1], depth=16, kind=2
            ),
            (9, 99, 199),
        ),
        "cmyk": (encoded(PIL.Image.new("CMYK", SIZE, (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        "transparent": (encoded(PIL.Image.new("RGBA", SIZE, (9, 9, 9, 0))), (255, 255, 255)),
        "half transparent": (encoded(half), (127, 127, 127)),
        "half transparent webp": (encoded(half, "WEBP", lossless=True), (127, 127, 127)),
        "transparent palette": (encoded(clear, transparency=0), (255, 255, 255)),
        "gray and alpha": (encoded(PIL.Image.new("LA", SIZE, (9, 0))), (255, 255, 255)),
        "animation": (
            encoded(
                PIL.Image.new("RGB", SIZE, RED),
                "WEBP",
                save_all=True,
                append_images=[PIL.Image.new("RGB", SIZE, BLUE)],
                lossless=True,
            ),
            RED,
        ),
        "animated png": (
            encoded(
                PIL.Image.new("RGB", SIZE, RED),
                save_all=True,
                append_images=[PIL.Image.new("RGB", SIZE, BLUE)],
            ),
            RED,
        ),
    }
    for name, (data, color) in cases.items():
        image = await shown(decoder, data)
        assert image.size == SIZE
        assert near(image.getpixel((40, 30)), color), name


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_the_orientation_is_applied(decoder: DecoderPool, orientation: int) -> None:
    """The same as Pillow turns it, from files of all three formats; ``source`` is as it is seen."""
    image = halves((90, 60))
    image.paste((0, 255, 0), (0, 0, 20, 20))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(image, format, exif=exif, **({} if format == "PNG" else {"quality": 100}))
        turned = image.copy()
        turned.getexif()[0x0112] = orientation
        wanted = PIL.ImageOps.exif_transpose(turned)
        fit = Fit(
            kind="cover",
            bounds=Bounds(least=1, most=512, multiple=1),
            width=wanted.width,
            height=wanted.height,
        )
        decoded = await decoder.decode("a", "image", data, fit)
        assert decoded.source == wanted.size
        found = PIL.Image.frombytes("RGB", wanted.size, decoded.pixels)
        corners = [(5, 5), (wanted.width - 6, 5), (5, wanted.height - 6)]
        for at in corners:
            assert near(found.getpixel(at), wanted.getpixel(at), by=40), (format, at)


async def test_broken_metadata_costs_no_picture(decoder: DecoderPool) -> None:
    data = encoded(PIL.Image.new("RGB", SIZE, RED), "JPEG", exif=b"Exif\0\0XX*\0\xff\xff\xff\xff")
    assert near((await shown(decoder, data)).getpixel((1, 1)), RED)


async def test_a_picture_covers_the_size_and_is_cropped_in_the_centre(decoder: DecoderPool) -> None:
    wide = PIL.Image.new("RGB", (300, 100), BLUE)
    wide.paste(RED, (100, 0, 200, 100))
    image = await shown(
        decoder, encoded(wide), Fit(kind="cover", bounds=BOUNDS, width=64, height=64)
    )
    assert image.size == (64, 64)
    for at in ((1, 1), (62, 62), (32, 32), (62, 1)):
        assert near(image.getpixel(at), RED)
    tall = encoded(wide.transpose(PIL.Image.Transpose.ROTATE_90))
    image = await shown(decoder, tall, Fit(kind="cover", bounds=BOUNDS, width=64, height=192))
    assert near(image.getpixel((32, 2)), BLUE)
    assert near(image.getpixel((32, 96)), RED)


OWN_SIZES = [
    ((96, 64), None, None, (96, 64)),
    ((100, 70), None, None, (104, 72)),
    ((1000, 500), None, None, (512, 256)),
    ((40, 20), None, None, (128, 64)),
    ((5000, 100), None, None, (512, 64)),
    ((300, 200), 96, None, (96, 64)),
    ((300, 200), None, 64, (96, 64)),
    ((300, 200), 64, 512, (64, 512)),
]


@pytest.mark.parametrize(("picture", "width", "height", "wanted"), OWN_SIZES)
async def test_the_size_follows_from_the_picture(
    decoder: DecoderPool, picture: Any, width: Any, height: Any, wanted: Any
) -> None:
    assert own_size(picture, width, height, BOUNDS) == wanted
    fit = Fit(kind="cover", bounds=BOUNDS, width=width, height=height)
    found = await decoder.decode("a", "image", plain(size=picture), fit)
    assert (found.width, found.height) == wanted
    assert found.source == picture


@pytest.mark.parametrize(
    ("picture", "width", "wanted"),
    [((300, 100), None, (256, 128)), ((100, 90), None, (128, 128)), ((300, 100), 128, (128, 128))],
)
async def test_a_model_with_fixed_sizes_gets_the_nearest(
    decoder: DecoderPool, picture: Any, width: Any, wanted: Any
) -> None:
    sizes = ((128, 128), (256, 128), (128, 256))
    bounds = Bounds(least=64, most=512, multiple=8, sizes=sizes)
    fit = Fit(kind="cover", bounds=bounds, width=width)
    found = await decoder.decode("a", "image", plain(size=picture), fit)
    assert (found.width, found.height) == wanted


async def test_a_reference_keeps_its_size_within_the_limit(decoder: DecoderPool) -> None:
    within = Fit(kind="within", bounds=BOUNDS)
    assert (await shown(decoder, plain(size=(33, 7)), within)).size == (33, 7)
    assert (await shown(decoder, plain(size=(1024, 300)), within)).size == (512, 150)


def mask_fit(expected: tuple[int, int] = SIZE) -> Fit:
    return Fit(kind="cover", bounds=BOUNDS, width=96, height=64, gray=True, expected=expected)


async def test_a_mask_is_black_and_white(decoder: DecoderPool) -> None:
    image = await shown(decoder, mask(), mask_fit())
    assert image.mode == "L"
    assert image.getpixel((10, 30)) == 0
    assert image.getpixel((80, 30)) == 255
    for gray, wanted in ((127, 0), (128, 255)):
        data = encoded(PIL.Image.new("L", SIZE, gray))
        assert (await shown(decoder, data, mask_fit())).getextrema() == (wanted, wanted)
    clear = encoded(PIL.Image.new("RGBA", SIZE, (0, 0, 0, 0)))
    assert (await shown(decoder, clear, mask_fit())).getextrema() == (255, 255)


async def test_the_transparency_of_a_mask_counts_if_it_has_any(decoder: DecoderPool) -> None:
    opaque = PIL.Image.new("RGBA", SIZE, (255, 255, 255, 255))
    assert set((await decoder.decode("a", "m", encoded(opaque), mask_fit())).pixels) == {255}
    opaque.paste((0, 0, 0, 0), (0, 0, 1, 1))
    pixels = (await decoder.decode("a", "m", encoded(opaque), mask_fit())).pixels
    assert (pixels[0], set(pixels[1:])) == (255, {0})


async def test_a_mask_of_another_size_is_rejected(decoder: DecoderPool) -> None:
    says = await rejected(decoder, mask((96, 72)), mask_fit())
    assert says == "must have the size of image, 96×64, and has 96×72"


@pytest.mark.parametrize("name", NOT_PICTURES)
async def test_other_files_are_rejected(decoder: DecoderPool, name: str) -> None:
    assert await rejected(decoder, NOT_PICTURES[name]) == "is not a PNG, JPEG or WebP picture"


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_damaged_picture_is_rejected(decoder: DecoderPool, name: str) -> None:
    assert await rejected(decoder, DAMAGED[name]) == "is damaged: it cannot be decoded"


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_a_large_picture_is_rejected_by_its_header(decoder: DecoderPool, name: str) -> None:
    says = await rejected(decoder, TOO_LARGE[name])
    assert says.endswith("pixels, and at most 64 million are decoded")
    assert peak_bytes(decoder) < 128 * 1024**2


async def test_a_header_that_claims_too_much_takes_no_memory(decoder: DecoderPool) -> None:
    """Pillow allocates an animated WebP's canvas before anything can look at its size."""
    await rejected(decoder, webp_header(2**24, 2**24))
    await rejected(decoder, webp_header(16_383, 16_383))
    assert peak_bytes(decoder) < 128 * 1024**2


async def test_memory_is_limited() -> None:
    """A picture of allowed size may still take more memory than its worker has."""
    decoder = DecoderPool(workers=1, max_pixels=64_000_000, timeout=60.0)
    small = DecoderPool(workers=1, max_pixels=64_000_000, timeout=60.0, bytes_per_pixel=1)
    try:
        data = png(6000, 6000, bytes(6001 * 6000))
        assert (await decoder.decode("a", "image", data, SAME)).width == SIZE[0]
        assert await rejected(small, data) == "takes too much memory to decode"
        assert near((await shown(small, plain(RED))).getpixel((1, 1)), RED)
    finally:
        await asyncio.gather(decoder.close(), small.close())


async def test_a_check_returns_no_pixels(decoder: DecoderPool) -> None:
    fit = Fit(kind="check", bounds=Bounds(least=1, most=1, multiple=1))
    found = await decoder.decode("a", "chunk", plain(size=(300, 200)), fit)
    assert found == Decoded(source=(300, 200), width=0, height=0, channels=0, pixels=b"")
    with pytest.raises(InvalidRequest):
        await decoder.decode("a", "chunk", DAMAGED["truncated png"], fit)
