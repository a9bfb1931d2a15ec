"""Records in pictures that other programs wrote, or damaged."""

import io
import struct
import zlib

import PIL.Image
import PIL.PngImagePlugin
import pytest

from darkroom_client._types.picture import embedded_text, is_picture

TEXT = '{"a": "★ & <b>"}'
XMP = "<darkroom:record>{}</darkroom:record>"
ESCAPED = XMP.format(TEXT.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def png(*, zip: bool = False, keyword: str = "darkroom-record") -> bytes:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("other", "x" * 100)
    info.add_itxt(keyword, TEXT, "en", "a record", zip=zip)
    return saved("PNG", pnginfo=info)


def saved(format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (9, 7), "red").save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        png(),
        png(zip=True),
        saved("JPEG", xmp=ESCAPED.encode(), exif=b"Exif\0\0" + bytes(20)),
        saved("WEBP", xmp=ESCAPED.encode()),
        saved("WEBP", lossless=True, xmp=ESCAPED.encode()),
    ],
)
def test_a_record_is_found(data: bytes) -> None:
    assert is_picture(data)
    assert embedded_text(data) == TEXT
    # Cut off anywhere, the file has the whole record or none.
    found = [embedded_text(data[:size]) for size in range(12, len(data))]
    assert set(found) == {None, TEXT}


@pytest.mark.parametrize(
    "data", [png(keyword="comment"), saved("PNG"), saved("JPEG"), saved("WEBP", xmp=b"<x/>")]
)
def test_other_pictures_have_none(data: bytes) -> None:
    assert is_picture(data)
    assert embedded_text(data) is None


def test_other_files_are_not_pictures() -> None:
    assert not any(map(is_picture, (b"", b"{}", b"RIFF1234WAVE", b"\x89PN")))


def test_a_small_file_cannot_grow_without_bound() -> None:
    packed = zlib.compress(b" " * (1 << 26), 9)
    body = b"darkroom-record\0\1\0\0\0" + packed
    chunk = struct.pack(">I", len(body)) + b"iTXt" + body + bytes(4)
    text = embedded_text(b"\x89PNG\r\n\x1a\n" + chunk)
    assert text is not None
    assert len(text) <= 1 << 20
