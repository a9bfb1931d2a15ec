"""The pixels of the fake engine: of its previews, and of the pictures of its callers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from darkroom_server.core.events import PreviewReady
from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job
from darkroom_server.engine.output.formats import encode_preview, preview_size


def fake_preview(job: Job, index: int, step: int, colour: Sequence[int]) -> PreviewReady:
    """The preview of image ``index`` of ``job`` after ``step`` steps: one flat ``colour``."""
    size = preview_size(job.width, job.height)
    pixels = np.full((8, 8, 3), colour, np.uint8)
    return PreviewReady(
        job_id=job.id,
        image_index=index,
        step=step,
        data=encode_preview(pixels, size, job.preview_format),
        format=job.preview_format,
        width=size[0],
        height=size[1],
    )


def pixels_of(image: InputImage) -> npt.NDArray[np.uint8]:
    """The pixels of a picture, height × width × channels."""
    array = np.frombuffer(image.pixels, np.uint8)
    return array.reshape(image.height, image.width, image.channels)
