"""How the size of a picture is made to fit: plain arithmetic, in the server and in its workers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The sizes that a model takes, in pixels: each side from ``least`` to ``most``.

    ``sizes``: the only pairs of width and height, if not empty.
    """

    least: int
    most: int
    multiple: int
    sizes: tuple[tuple[int, int], ...] = ()

    def nearest(self, side: float) -> int:
        """The side that the model takes, and that is nearest to ``side``."""
        low = -(-self.least // self.multiple) * self.multiple
        high = self.most // self.multiple * self.multiple
        rounded = int(side / self.multiple + 0.5) * self.multiple
        return min(max(rounded, low), high)


def own_size(
    picture: tuple[int, int], width: int | None, height: int | None, bounds: Bounds
) -> tuple[int, int]:
    """The width and height of a job that starts from ``picture`` and names only some of them.

    With none, the picture's own, scaled until both sides are within the bounds if its aspect ratio
    allows that. With one, the other one follows from the picture's aspect ratio. If the bounds have
    ``sizes``, it is the one of them whose aspect ratio is nearest to the picture's.
    """
    if width is not None and height is not None:
        return width, height
    if bounds.sizes:
        known = [s for s in bounds.sizes if width in (None, s[0]) and height in (None, s[1])]
        ratio = picture[0] / picture[1]
        return min(known or bounds.sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))
    own_width, own_height = picture
    if width is not None:
        scale = width / own_width
    elif height is not None:
        scale = height / own_height
    else:
        scale = max(bounds.least / min(picture), min(1.0, bounds.most / max(picture)))
    return (
        bounds.nearest(own_width * scale) if width is None else width,
        bounds.nearest(own_height * scale) if height is None else height,
    )


def edit_size(
    picture: tuple[int, int], width: int | None, height: int | None, area: int, bounds: Bounds
) -> tuple[int, int]:
    """The width and height of an edit of ``picture`` that names only some of them.

    With none, it has the picture's aspect ratio and about ``area`` pixels; else as ``own_size``.
    """
    if width is not None or height is not None or bounds.sizes:
        return own_size(picture, width, height, bounds)
    scale = math.sqrt(area / (picture[0] * picture[1]))
    return bounds.nearest(picture[0] * scale), bounds.nearest(picture[1] * scale)


def covering_box(picture: tuple[int, int], size: tuple[int, int]) -> tuple[float, ...]:
    """The part of ``picture`` that ``size`` shows: left, top, right, bottom.

    The picture is scaled to cover ``size``, and cropped in the centre.
    """
    scale = max(size[0] / picture[0], size[1] / picture[1])
    width, height = (min(own, side / scale) for own, side in zip(picture, size, strict=True))
    left, top = (picture[0] - width) / 2, (picture[1] - height) / 2
    return left, top, left + width, top + height


def within(picture: tuple[int, int], most: int) -> tuple[int, int]:
    """The size of ``picture`` after it is scaled down, if it must be, to sides of ``most``."""
    scale = min(1.0, most / max(picture))
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))
