"""The edges of a picture, for ControlNets that read edges."""

import io
import math
import os
from typing import TYPE_CHECKING

from darkroom_client._checks import check_number
from darkroom_client._wire.inputs import file_bytes

if TYPE_CHECKING:
    import numpy
    import numpy.typing
    import PIL.Image

_FORMATS = ("PNG", "JPEG", "WEBP")
_STEEP = 1 + math.sqrt(2)  # The tangent of 67.5°; its inverse is that of 22.5°.


def canny(
    image: "bytes | str | os.PathLike[str] | PIL.Image.Image",
    low: float = 100.0,
    high: float = 200.0,
    *,
    blur: float = 1.0,
) -> bytes:
    """Find the edges of a picture by Canny's method: the image of a ``Control``, as a PNG.

    ``image``: the bytes of a PNG, JPEG or WebP file, its path, or a ``PIL.Image.Image``. The result
    has the same size and 8 bits: white edges, one pixel wide, on black.

    ``low``, ``high``: an edge begins at a pixel that is stronger than ``high``, and continues
    through pixels that are stronger than ``low``. The strength of a pixel is 0 to 1530: the sum of
    its two Sobel derivatives, without their signs, in the channel where it is largest. ``blur``:
    the radius in pixels of the Gaussian blur before that; 0 for none.

    Needs the extra ``numpy``, without which it raises ``ImportError``. Raises ``ValueError`` for
    bytes that are no such picture and for thresholds that are not in order, ``OSError`` for a file
    that cannot be read.
    """
    for name, value in (("low", low), ("high", high), ("blur", blur)):
        check_number(name, value)
    if not 0 <= low <= high:
        raise ValueError(f"low is {low:g}, must be 0 to high, which is {high:g}")
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur is {blur:g}, must be at least 0")
    try:
        import numpy
        import PIL.Image
        import PIL.ImageFilter
    except ImportError as error:
        raise ImportError(
            "canny needs Pillow and numpy: pip install 'darkroom-client[numpy]'"
        ) from error

    picture = _load(image).filter(PIL.ImageFilter.GaussianBlur(blur))
    strength, ridges = _ridges(numpy.asarray(picture, dtype=numpy.int16))
    edges = _follow(ridges & (strength > low), ridges & (strength > high))
    file = io.BytesIO()
    PIL.Image.fromarray(edges.astype(numpy.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def _load(image: "bytes | str | os.PathLike[str] | PIL.Image.Image") -> "PIL.Image.Image":
    """The picture in RGB, with the rules by which the server reads a control's image."""
    import numpy
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, PIL.Image.Image):
        picture = image
    else:
        data = file_bytes("image", image)
        try:
            file = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        except PIL.UnidentifiedImageError as error:
            raise ValueError("image is not a PNG, JPEG or WebP file") from error
        picture = PIL.ImageOps.exif_transpose(file)
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((numpy.asarray(picture) >> 8).astype(numpy.uint8))
    white = PIL.Image.new("RGBA", picture.size, "white")
    return PIL.Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _ridges(
    pixels: "numpy.typing.NDArray[numpy.int16]",
) -> "tuple[numpy.typing.NDArray[numpy.int16], numpy.typing.NDArray[numpy.bool_]]":
    """The strength of each pixel, and whether it is the strongest across its edge.

    ``pixels`` has the shape [height, width, channels], both results [height, width].
    """
    import numpy

    framed = numpy.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    columns = framed[:-2] + 2 * framed[1:-1] + framed[2:]
    rows = framed[:, :-2] + 2 * framed[:, 1:-1] + framed[:, 2:]
    across, down = columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]
    channel = numpy.argmax(abs(across) + abs(down), axis=2, keepdims=True)
    across = numpy.take_along_axis(across, channel, axis=2)[..., 0]
    down = numpy.take_along_axis(down, channel, axis=2)[..., 0]
    strength = abs(across) + abs(down)

    height, width = strength.shape
    around = numpy.pad(strength, 1)

    def neighbour(y: int, x: int) -> "numpy.typing.NDArray[numpy.int16]":
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    level = abs(down) * _STEEP < abs(across)
    upright = abs(down) > abs(across) * _STEEP
    straight = level | upright
    directions = [level, upright, (across < 0) == (down < 0)]
    before = numpy.select(
        directions, [neighbour(0, -1), neighbour(-1, 0), neighbour(-1, -1)], neighbour(-1, 1)
    )
    after = numpy.select(
        directions, [neighbour(0, 1), neighbour(1, 0), neighbour(1, 1)], neighbour(1, -1)
    )
    # Of two equal pixels that are side by side, one is the edge.
    ridges = (strength > before) & ((strength > after) | (straight & (strength == after)))
    return strength, ridges


def _follow(
    weak: "numpy.typing.NDArray[numpy.bool_]", strong: "numpy.typing.NDArray[numpy.bool_]"
) -> "numpy.typing.NDArray[numpy.bool_]":
    """The pixels of ``weak`` that touch one of ``strong``, also through others of ``weak``."""
    import numpy

    framed = numpy.pad(weak, 1)  # So that each pixel has eight neighbours.
    width = framed.shape[1]
    around = numpy.array([y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1)])
    left, found = framed.ravel(), numpy.zeros(framed.size, dtype=bool)
    reached = numpy.flatnonzero(numpy.pad(strong, 1))
    while reached.size:
        found[reached] = True
        left[reached] = False
        near = (reached[:, None] + around).ravel()
        reached = numpy.unique(near[left[near]])
    return found.reshape(framed.shape)[1:-1, 1:-1]
