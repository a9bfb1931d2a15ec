"""The images and adapters that a request brings."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedImage:
    """An image by its name on the server: "sha256:" and the SHA-256 of its file, in hex.

    The records of images name the images that they started from in this way. The server knows an
    image for a while after its caller has sent it.
    """

    upload_id: str = field(kw_only=False)


if TYPE_CHECKING:
    ImageSource: TypeAlias = bytes | str | os.PathLike[str] | PIL.Image.Image | UploadedImage
else:  # Its parts must exist where type hints are evaluated, also without Pillow.
    ImageSource = bytes | str | os.PathLike | UploadedImage
"""A PNG, JPEG or WebP picture: the bytes of its file, the file's path, a ``PIL.Image.Image`` (needs
the extra ``pil``), or its name on the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A ControlNet: its id on the server, and the image that it reads, such as edges.

    ``scale``: how strong it is, 0 to 2. It is applied from ``start`` to ``end``, as parts of the
    steps, 0 to 1.
    """

    id: str = field(kw_only=False)
    image: ImageSource = field(kw_only=False, repr=False)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
