"""The edges that the client finds in a picture."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import PIL.ImageDraw
import pytest

from darkroom_client import UploadedImage, canny

LEFT, TOP, RIGHT, BOTTOM = BOX = (16, 20, 47, 43)
SIZE = (64, 72)


def square(level: int = 255) -> PIL.Image.Image:
    """A filled rectangle on black; its pixels are those within ``BOX``, the bounds included."""
    picture = PIL.Image.new("RGB", SIZE)
    PIL.ImageDraw.Draw(picture).rectangle(BOX, (level, level, level))
    return picture


def edges(image: Any, *thresholds: float, **options: float) -> numpy.ndarray:
    with PIL.Image.open(io.BytesIO(canny(image, *thresholds, **options))) as found:
        assert (found.format, found.mode) == ("PNG", "L")
        pixels = numpy.asarray(found)
    assert set(numpy.unique(pixels)) <= {0, 255}
    return pixels > 0


def encoded(picture: PIL.Image.Image, name: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


def outline_distance(box: tuple[int, int, int, int]) -> numpy.ndarray:
    """For each pixel, how far it is from the outline of ``box``, in pixels."""
    left, top, right, bottom = box
    y, x = numpy.mgrid[: SIZE[1], : SIZE[0]]
    outside = numpy.maximum.reduce([left - x, x - right, top - y, y - bottom])
    return abs(outside)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_the_edges_of_a_square_are_its_outline(blur: float) -> None:
    found = edges(square(), blur=blur)
    assert (outline_distance(BOX)[found] <= 1).all()
    # One pixel wide: a row and a column through the middle cross two edges each.
    assert found[(TOP + BOTTOM) // 2].sum() == found[:, (LEFT + RIGHT) // 2].sum() == 2
    assert found.sum() >= 2 * (RIGHT - LEFT) + 2 * (BOTTOM - TOP) - 8
    # The edges lie on no other outline.
    shifted = (LEFT + 6, TOP + 6, RIGHT + 6, BOTTOM + 6)
    assert not (outline_distance(shifted)[found] <= 1).all()


@pytest.mark.parametrize("colour", ["black", "white", "#7f4020"])
def test_a_blank_picture_has_no_edges(colour: str) -> None:
    assert not edges(PIL.Image.new("RGB", SIZE, colour), 0, 0).any()


def halves(levels: list[int]) -> PIL.Image.Image:
    """Black on the left, and on the right of column 32 a gray of each row: one upright edge.

    Without a blur its strength in a row is about four times the row's gray.
    """
    picture = PIL.Image.new("L", (64, len(levels)))
    for y, level in enumerate(levels):
        picture.paste(level, (32, y, 64, y + 1))
    return picture


def test_weak_edges_need_low_thresholds() -> None:
    faint = halves([40] * 64)
    assert not edges(faint, 100, 160, blur=0).any()
    assert edges(faint, 100, 159, blur=0).sum() == 64


def test_a_weak_edge_continues_a_strong_one() -> None:
    # Strong at the top, 480; weak in row 40, 160; stronger again at the bottom, 344.
    picture = halves([120 - 2 * y if y < 40 else 2 * y - 40 for y in range(64)])
    assert edges(picture, 100, 400, blur=0).any(axis=1).all()
    parted = edges(picture, 250, 400, blur=0)
    assert parted[:20].any(axis=1).all()
    assert not parted[36:].any()  # Stronger than 250, but it touches nothing above 400.
    assert edges(picture, 250, 300, blur=0)[60:].any()


def test_blur_removes_noise() -> None:
    speckled = square()
    speckled.putpixel((5, 5), (120, 120, 120))
    assert edges(speckled, blur=0)[:10, :10].any()
    assert not edges(speckled, blur=1.5)[:10, :10].any()


def test_colours_of_equal_brightness_have_an_edge() -> None:
    picture = PIL.Image.new("RGB", SIZE, (0, 130, 0))
    PIL.ImageDraw.Draw(picture).rectangle(BOX, (255, 0, 0))
    assert not edges(picture.convert("L")).any()
    assert edges(picture)[30].sum() == 2


def test_bytes_paths_and_pictures_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "square.png"
    square().save(path)
    assert canny(path) == canny(str(path)) == canny(path.read_bytes()) == canny(square())
    assert canny(path) != canny(square(90))


def test_pictures_are_read_as_the_server_reads_them() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # To be shown a quarter turn clockwise.
    turned = encoded(square().transpose(PIL.Image.Transpose.ROTATE_90), exif=exif)
    assert (edges(turned) == edges(square())).all()

    clear = square().convert("RGBA")
    clear.putalpha(PIL.Image.new("L", SIZE, 0))  # White, whatever its colours.
    assert not edges(clear).any()

    deep = PIL.Image.fromarray(numpy.asarray(square().convert("L")).astype(numpy.uint16) * 10)
    assert not edges(deep).any()  # Its high bytes are 0 and 9.
    assert edges(deep, 10, 20).any()


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (b"<svg/>", {}, ValueError, "image is not a PNG, JPEG or WebP file"),
        (encoded(square(), "GIF"), {}, ValueError, "image is not a PNG, JPEG or WebP file"),
        (encoded(square())[:60], {}, OSError, "truncated"),
        ("none.png", {}, FileNotFoundError, "none.png"),
        (UploadedImage("sha256:0"), {}, TypeError, "image is a UploadedImage"),
        (7, {}, TypeError, "image is a int"),
        (b"", {"low": 201}, ValueError, "low is 201, must be 0 to high, which is 200"),
        (b"", {"low": -1}, ValueError, "low is -1"),
        (b"", {"high": "much"}, TypeError, "high is 'much', must be a number"),
        (b"", {"blur": -1}, ValueError, "blur is -1, must be at least 0"),
    ],
)
def test_errors(image: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        canny(image, **options)


@pytest.mark.parametrize("library", ["PIL", "numpy"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"pip install 'darkroom-client\[numpy\]'"):
        canny(b"")
