"""The end of a suspended run: from its last step to pixels."""

from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from PIL import Image

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job
from darkroom_server.engine.components.decoder import Decoder, pixels_of
from darkroom_server.engine.failures import (
    DECODE_FAILED,
    OUT_OF_MEMORY,
    is_fatal,
    is_out_of_memory,
)
from darkroom_server.engine.pipelines.calls import DecodeCall, EncodeImageCall
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample, UnexpectedCall

log = structlog.get_logger(__name__)


def finish(sample: SuspendedSample, decoder: Decoder, runs: Runs) -> NDArray[np.uint8] | Failure:
    """The pixels of ``sample``, which took its last step: [height, width, 3], 0 to 255.

    Raises an error that means that the device is lost.
    """
    try:
        while (call := sample.pending) is not None:
            match call:
                case DecodeCall():
                    image = decoder.decode_scaled(call.latents, call.options)
                    if isinstance(image, Failure):
                        return image
                    sample.resume(image)
                case EncodeImageCall():
                    # Some VAEs decode with the input image beside the latents.
                    sample.resume(runs.encode_image(call.images, call.options))
                case _:
                    raise UnexpectedCall(f"a {type(call).__name__} after the last step")
        return _pixels(sample.result[0], sample.job)
    except Exception as error:
        if is_fatal(error):
            raise
        if is_out_of_memory(error):
            log.warning("decode ran out of memory", why=str(error), **sample.job.log_fields)
            decoder.counts[Counted.OUT_OF_MEMORY_FAILED] += 1
            return OUT_OF_MEMORY
        log.exception("decode failed", **sample.job.log_fields)
        return DECODE_FAILED
    finally:
        sample.result = None


def _pixels(image: Any, job: Job) -> NDArray[np.uint8]:
    """``image``, the first of what the pipeline returned, as [height, width, 3]."""
    first = image[0]
    if isinstance(first, Image.Image):
        pixels: NDArray[np.uint8] = np.asarray(first.convert("RGB"))
    else:
        # The arithmetic of diffusers' VaeImageProcessor, for equal values.
        pixels = pixels_of(first)
    if pixels.shape != (job.height, job.width, 3):
        raise UnexpectedCall(f"an image of {pixels.shape}, not {job.height}×{job.width}")
    return pixels
