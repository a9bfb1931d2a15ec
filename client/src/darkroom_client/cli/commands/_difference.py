"""How much the pixels of two pictures differ; needs Pillow."""

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.image import Image
from darkroom_client._types.picture import embedded_text, is_picture
from darkroom_client._types.replay import ReplayRecord

if TYPE_CHECKING:
    import PIL.Image

NEARLY_SAME_DECIBELS = 40.0
"""From this peak signal-to-noise ratio on, people see no difference."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``most``: of any value of 0 to 255. ``decibels``: the peak signal-to-noise ratio."""

    most: int
    decibels: float

    @property
    def nearly_same(self) -> bool:
        """Whether people see no difference."""
        return self.decibels >= NEARLY_SAME_DECIBELS

    def __str__(self) -> str:
        return f"{self.most} of 255 ({self.decibels:.0f} dB)"


def difference(record: ReplayRecord, path: Path, image: Image) -> Difference | None:
    """How much ``image`` differs from the picture of ``record``.

    ``path``: the file of the record; the picture is this file, or is beside it. None if there is
    no such picture, or if it is not the picture of the record.
    """
    # A JPEG's pixels are compared as they were decoded: both went through the same encoder.
    old = next((found for found in _candidates(record, path) if _belongs(found, record)), None)
    if old is None:
        return None
    return _measure(_decode(old, record), image.to_pil())


def _candidates(record: ReplayRecord, path: Path) -> list[bytes]:
    data = path.read_bytes()
    if is_picture(data):
        return [data]
    suffixes = ImageFormat(record.request.format or ImageFormat.PNG).suffixes
    beside = [path.with_suffix(suffix) for suffix in suffixes]
    return [each.read_bytes() for each in beside if each.is_file()]


def _belongs(data: bytes, record: ReplayRecord) -> bool:
    """Whether the picture ``data`` has the pixels that the record describes."""
    if record.request.format in (ImageFormat.JPEG, ImageFormat.WEBP):
        text = embedded_text(data)
        return (
            text is not None and ReplayRecord.from_json(text).pixels_sha256 == record.pixels_sha256
        )
    raw = record.request.format == ImageFormat.RAW_RGB
    pixels = data if raw else _decode(data, record).tobytes()
    return hashlib.sha256(pixels).hexdigest() == record.pixels_sha256


def _decode(data: bytes, record: ReplayRecord) -> "PIL.Image.Image":
    import PIL.Image

    request = record.request
    if request.format == ImageFormat.RAW_RGB:
        return PIL.Image.frombytes("RGB", (request.width or 0, request.height or 0), data)
    with PIL.Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def _measure(old: "PIL.Image.Image", new: "PIL.Image.Image") -> Difference | None:
    from PIL import ImageChops

    if old.size != new.size:
        return None
    counts = ImageChops.difference(old, new).histogram()
    levels = [(index % 256, count) for index, count in enumerate(counts) if count]
    squares = sum(level * level * count for level, count in levels)
    mean = squares / sum(count for _, count in levels)
    decibels = 10 * math.log10(255**2 / mean) if mean else math.inf
    return Difference(most=max(level for level, _ in levels), decibels=decibels)
