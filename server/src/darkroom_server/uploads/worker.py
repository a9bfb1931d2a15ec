"""A worker process that decodes pictures, one after the other, from stdin to stdout.

It trusts nothing that it decodes: its memory is limited, and it may die. Its arguments: the most
bytes of its address space, and the most pixels of a picture. Each request is a line of JSON with
``size`` and the fields of ``Fit``, and ``size`` bytes: the file. Each reply is a line of JSON: a
``failure``; or the picture's own ``source`` size and the ``width``, ``height`` and ``channels`` of
the pixels that follow. An empty line says that it is ready.
"""

import io
import json
import resource
import struct
import sys
import warnings
from typing import Any

from PIL import Image, ImageChops

from darkroom_server.uploads.failure import DecodeFailure
from darkroom_server.uploads.fit import Bounds, covering_box, own_size, within

FORMATS = ("PNG", "JPEG", "WEBP")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
"""What the files of ``FORMATS`` begin with."""

ORIENTATION = 0x0112
"""The EXIF tag."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each orientation asks for, as ``ImageOps.exif_transpose`` does it."""

SIDEWAYS = range(5, 9)
WHITE_FROM = 128
"""A mask's gray that counts as white."""


class Unusable(Exception):
    """The picture cannot be used; ``source`` is its size if that is known."""

    def __init__(self, failure: DecodeFailure, source: tuple[int, int] | None = None) -> None:
        super().__init__(failure)
        self.failure = failure
        self.source = source


def decode(data: bytes, fit: dict[str, Any], max_pixels: int) -> tuple[tuple[int, int], Any]:
    """The picture's own size, as it is seen, and the image; None for kind ``check``.

    Raises ``Unusable``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise Unusable(DecodeFailure.TOO_MUCH_MEMORY) from None
    except Exception as error:  # Pillow's parsers raise anything for bytes that are not theirs.
        known = data.startswith(SIGNATURES) and (data[:4] != b"RIFF" or data[8:12] == b"WEBP")
        raise Unusable(DecodeFailure.DAMAGED if known else DecodeFailure.NOT_A_PICTURE) from error
    source: tuple[int, int] = image.size
    if source[0] * source[1] > max_pixels:
        raise Unusable(DecodeFailure.TOO_MANY_PIXELS, source)
    try:
        image.load()
        orientation = _orientation(image)  # Not before: of a PNG, it is behind the pixels.
        source = source[::-1] if orientation in SIDEWAYS else source
        if fit.get("expected") is None or list(source) == fit["expected"]:
            return source, _fitted(image, source, orientation, fit)
    except MemoryError:
        raise Unusable(DecodeFailure.TOO_MUCH_MEMORY, source) from None
    except Exception as error:  # As above: what a damaged file makes of a parser.
        raise Unusable(DecodeFailure.DAMAGED, source) from error
    raise Unusable(DecodeFailure.WRONG_SIZE, source)


def _orientation(image: Any) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except (
        ArithmeticError,
        LookupError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ):
        return 1  # The picture may be good, if its metadata is not.
    return found if found in TURNS else 1


def _fitted(image: Any, source: tuple[int, int], orientation: int, fit: dict[str, Any]) -> Any:
    kind = fit["kind"]
    if kind == "check":
        return None
    box = (0.0, 0.0, *map(float, source))
    if kind == "within":
        size = within(source, fit["most"])
    else:
        bounds = Bounds(
            least=fit["least"],
            most=fit["most"],
            multiple=fit["multiple"],
            sizes=tuple((width, height) for width, height in fit["sizes"]),
        )
        size = own_size(source, fit["width"], fit["height"], bounds)
        box = covering_box(source, size)
    if orientation in SIDEWAYS:  # The small image is turned, not the large one.
        box, size = (box[1], box[0], box[3], box[2]), size[::-1]
    plain = _in_8_bits(image)
    if fit["gray"]:
        plain = _as_mask(plain)
    resized = plain.resize(size, Image.Resampling.LANCZOS, box=box)
    if resized.mode == "RGBA":
        white = Image.new("RGBA", resized.size, "white")
        resized = Image.alpha_composite(white, resized).convert("RGB")
    if orientation in TURNS:
        resized = resized.transpose(TURNS[orientation])
    if fit["gray"]:
        return resized.convert("L").point(lambda value: 255 if value >= WHITE_FROM else 0)
    return resized


def _as_mask(image: Any) -> Any:
    """``image``, or its transparency as white if any of it is transparent."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
        return ImageChops.invert(image.getchannel("A"))
    return image


def _in_8_bits(image: Any) -> Any:
    """``image`` as RGB, or as RGBA if any of it is transparent."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits instead of scaling them.
        image.info.pop("transparency", None)
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _answer(request: dict[str, Any], data: bytes, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    try:
        source, image = decode(data, request, max_pixels)
    except Unusable as unusable:
        return {"failure": unusable.failure, "source": unusable.source}, b""
    if image is None:
        return {"source": source, "width": 0, "height": 0, "channels": 0}, b""
    width, height = image.size
    channels = len(image.getbands())
    reply = {"source": source, "width": width, "height": height, "channels": channels}
    return reply, image.tobytes()


def _limit(max_memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # Our own limit is checked before any pixel is decoded.


def main() -> None:
    """Decode until stdin ends."""
    max_memory, max_pixels = map(int, sys.argv[1:3])
    Image.init()
    _limit(max_memory)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"\n")
    replies.flush()
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size"])
        reply, pixels = _answer(request, data, max_pixels)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.write(pixels)
        replies.flush()


if __name__ == "__main__":
    main()
