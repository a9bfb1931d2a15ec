"""Picture files for tests."""

import io
import random
import struct
import zlib
from typing import Any

import PIL.Image

SIZE = (96, 64)
RED, BLUE, WHITE = (200, 30, 20), (20, 40, 190), (255, 255, 255)


def encoded(image: Any, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(color: tuple[int, ...] = RED, size: tuple[int, int] = SIZE, format: str = "PNG") -> bytes:
    return encoded(PIL.Image.new("RGB", size, color), format)


def halves(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Any:
    """Red on the left, blue on the right; for a mask black and white."""
    gray = mode == "L"
    image = PIL.Image.new(mode, size, 0 if gray else RED)
    image.paste(255 if gray else BLUE, (size[0] // 2, 0, *size))
    return image


def mask(size: tuple[int, int] = SIZE) -> bytes:
    """White on the right."""
    return encoded(halves(size, "L"))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, kind: int = 0) -> bytes:
    """A PNG with that header, and ``rows`` as its compressed data."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP that claims that size, and ends there."""
    body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
GIF = encoded(PIL.Image.new("P", SIZE), "GIF")
TIFF = encoded(PIL.Image.new("RGB", SIZE), "TIFF")
BMP = encoded(PIL.Image.new("RGB", SIZE), "BMP")
NOISE = random.Random(7).randbytes(64 * 64 * 3)

NOT_PICTURES = {
    "svg": SVG,
    "eps": EPS,
    "gif": GIF,
    "tiff": TIFF,
    "bmp": BMP,
    "noise": NOISE,
    "one byte": b"\x89",
    "zeros": bytes(1000),
    "riff": b"RIFF\x10\x00\x00\x00WAVEfmt ",
}

NOISY = PIL.Image.frombytes("RGB", (64, 64), NOISE)
DAMAGED = {
    "truncated png": encoded(NOISY)[:-3000],
    "truncated jpeg": encoded(NOISY, "JPEG")[:-1000],
    "truncated webp": encoded(NOISY, "WEBP")[:-1000],
    "png signature": b"\x89PNG\r\n\x1a\n",
    "png without rows": png(64, 64, b""),
    "jpeg marker": b"\xff\xd8\xff\xe0",
    "webp header": webp_header(64, 64),
}

TOO_LARGE = {
    "100 megapixels": png(10_000, 10_000, bytes(1000)),
    "a bomb": png(30_000, 30_000, bytes(10_000_000), depth=1),
    "the largest png": png(2**31 - 1, 2**31 - 1, b""),
}
"""Far more pixels than bytes."""
