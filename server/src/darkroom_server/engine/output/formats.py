"""Pixels to bytes, in the formats that a request may name."""

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from darkroom_server.core.job import ImageFormat

PNG_COMPRESSION = 1
"""Level 1 takes two thirds of the time of level 6, for a tenth more bytes."""

PREVIEW_QUALITY = 75
"""JPEG and WebP quality of a preview; Pillow's own default for JPEG."""

PREVIEW_SIDE = 256
"""Pixels of a preview's longer side, at most."""


PNG_RECORD_KEYWORD = "darkroom-record"
"""The keyword of the iTXt chunk that holds the replay record."""

XMP_PACKET = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:darkroom="urn:darkroom:v1">'
    "<darkroom:record>{record}</darkroom:record>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)
"""An XMP packet (ISO 16684-1) with the replay record as its one property."""


def encode_image(
    pixels: NDArray[np.uint8], format: ImageFormat, quality: int, record: str = ""
) -> bytes:
    """``pixels`` [height, width, 3] in ``format``; ``quality`` 1 to 100, for JPEG and WebP.

    ``record``: the replay record to write into the file, in ASCII without markup; "" for none.
    """
    if format is ImageFormat.RAW_RGB:
        return pixels.tobytes()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if format is ImageFormat.PNG:
        options["compress_level"] = PNG_COMPRESSION
        if record:
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt(PNG_RECORD_KEYWORD, record)
    else:
        options["quality"] = quality
        if record:
            options["xmp"] = XMP_PACKET.format(record=record).encode("ascii")
    image.save(buffer, format.name, **options)
    return buffer.getvalue()


def preview_size(width: int, height: int) -> tuple[int, int]:
    """The size of a preview of an image of ``width`` × ``height`` pixels, in the same shape."""
    shrink = min(1.0, PREVIEW_SIDE / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def encode_preview(pixels: NDArray[np.uint8], size: tuple[int, int], format: ImageFormat) -> bytes:
    """``pixels`` [h, w, 3] in ``format``, scaled to ``size`` (width, height) by bicubic filter."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, format.name, quality=PREVIEW_QUALITY)
    return buffer.getvalue()


def sha256_of(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 of the RGB bytes, row by row, in hex: the same in every format."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
