"""One finished image."""

import importlib.util
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom_client._errors import ImageWithheld
from darkroom_client._files import write_atomically
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.replay import ReplayRecord

if TYPE_CHECKING:
    import numpy
    import PIL.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One finished image: encoded pixels, and everything that is needed to reproduce it.

    ``data`` holds the pixels in ``format``; it is empty if the safety checker ``flagged`` the
    image. ``width`` and ``height`` are in pixels. ``seed`` reproduces this image alone.
    ``prompt_truncated``: the prompt was longer than the model reads, and its end was ignored.
    """

    data: bytes = field(repr=False)
    format: ImageFormat
    width: int
    height: int
    seed: int
    prompt_truncated: bool
    flagged: bool
    replay: ReplayRecord = field(repr=False)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write ``data`` to ``path`` atomically, and return the path.

        Raises ``ValueError`` if the suffix of ``path`` belongs to another format,
        ``FileExistsError`` if ``path`` exists and ``overwrite`` is false, and ``ImageWithheld`` if
        there are no pixels to write.
        """
        path = Path(path)
        if path.suffix.lower() not in self.format.suffixes:
            wanted = self.format.suffixes[0]
            raise ValueError(
                f"{path} does not go with an image in {self.format.value}: name it "
                f"{path.with_suffix(wanted).name}, or ask the server for another format"
            )
        write_atomically(path, self._pixels(), overwrite=overwrite)
        return path

    def to_pil(self) -> "PIL.Image.Image":
        """The image as an RGB ``PIL.Image.Image``; needs the extra ``pil``."""
        data = self._pixels()
        try:
            import PIL.Image
        except ImportError as error:
            raise _missing("Image.to_pil", "Pillow", "pil") from error
        if self.format is ImageFormat.RAW_RGB:
            return PIL.Image.frombytes("RGB", (self.width, self.height), data)
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    def to_numpy(self) -> "numpy.ndarray":
        """The pixels as a ``uint8`` array of shape [height, width, 3]; needs the extra ``numpy``.

        The array is a copy: the caller may write to it.
        """
        data = self._pixels()
        try:
            import numpy
        except ImportError as error:
            raise _missing("Image.to_numpy", "numpy", "numpy") from error
        if self.format is ImageFormat.RAW_RGB:
            flat = numpy.frombuffer(data, dtype=numpy.uint8)
            return flat.reshape(self.height, self.width, 3).copy()
        return numpy.array(self.to_pil(), dtype=numpy.uint8)

    def show(self) -> None:
        """Open the image in the system's picture viewer, or in the notebook.

        Needs the extra ``pil``. Raises ``ImageWithheld`` if there are no pixels to show.
        """
        self.to_pil().show()

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; None for a JPEG, and without Pillow for other formats than PNG."""
        if not self.data or self.format is ImageFormat.JPEG:
            return None
        if self.format is ImageFormat.PNG:
            return self.data
        if importlib.util.find_spec("PIL") is None:
            return None
        buffer = io.BytesIO()
        self.to_pil().save(buffer, "PNG")
        return buffer.getvalue()

    def _repr_jpeg_(self) -> bytes | None:
        """What a notebook shows of a JPEG."""
        return self.data if self.format is ImageFormat.JPEG and self.data else None

    def _pixels(self) -> bytes:
        if not self.data:
            raise ImageWithheld(
                f"the safety checker withheld the image of seed {self.seed}: it has no pixels",
                code="OK",
            )
        return self.data


def _missing(what: str, library: str, extra: str) -> ImportError:
    return ImportError(f"{what} needs {library}: pip install 'darkroom-client[{extra}]'")
