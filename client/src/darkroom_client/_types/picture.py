"""The replay record in a picture's file: found without a library, in PNG, JPEG and WebP."""

import re
import zlib
from collections.abc import Iterator
from xml.sax.saxutils import unescape

PNG_KEYWORD = b"darkroom-record"
"""The keyword of the iTXt chunk."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PROPERTY = re.compile(rb"<darkroom:record>(.*?)</darkroom:record>", re.DOTALL)
_LONGEST = 1 << 20


def is_picture(data: bytes) -> bool:
    """Whether ``data`` begins like a PNG, a JPEG or a WebP."""
    return data.startswith((_PNG, _JPEG)) or _is_webp(data)


def embedded_text(data: bytes) -> str | None:
    """The text of the record in the picture ``data``, None if it holds none.

    Raises ``ValueError`` if the record is damaged.
    """
    if data.startswith(_PNG):
        return _png_text(data)
    xmp = _webp_xmp(data) if _is_webp(data) else _jpeg_xmp(data)
    found = _PROPERTY.search(xmp)
    # Other programs may escape the text when they write the file again.
    return unescape(_text(found[1]), {"&quot;": '"', "&apos;": "'"}) if found else None


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _png_text(data: bytes) -> str | None:
    for kind, body in _png_chunks(data):
        keyword, _, rest = body.partition(b"\0")
        if kind != b"iTXt" or keyword != PNG_KEYWORD or len(rest) < 2:
            continue
        compressed = rest[0]
        # After the two flags: the language and the translated keyword.
        text = rest[2:].split(b"\0", 2)[-1]
        if compressed:
            try:
                text = zlib.decompressobj().decompress(text, _LONGEST)
            except zlib.error as error:
                raise ValueError(f"the record in the picture is damaged: {error}") from error
        return _text(text)
    return None


def _webp_xmp(data: bytes) -> bytes:
    return next((body for kind, body in _webp_chunks(data) if kind == b"XMP "), b"")


def _jpeg_xmp(data: bytes) -> bytes:
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) not in (b"\xda", b""):
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size]
        if marker == b"\xe1" and body.startswith(_XMP):
            return body[len(_XMP) :]
        at += 2 + max(2, size)
    return b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the body of each whole chunk."""
    at = len(_PNG)
    while (end := at + 12 + int.from_bytes(data[at : at + 4], "big")) <= len(data):
        yield data[at + 4 : at + 8], data[at + 8 : end - 4]
        at = end


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the body of each whole chunk."""
    at = 12
    while (end := at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")) <= len(data):
        yield data[at : at + 4], data[at + 8 : end]
        at = end + end % 2


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the record in the picture is damaged: {error}") from error
