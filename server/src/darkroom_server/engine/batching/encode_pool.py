"""The encode pool: pixels to the caller's format, on threads beside the loop's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog
from numpy.typing import NDArray

from darkroom_server.core.events import EncodedImage, JobFailed, PreviewReady
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.record import embedded_record
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.failures import ENCODE_FAILED
from darkroom_server.engine.output.formats import (
    encode_image,
    encode_preview,
    preview_size,
    sha256_of,
)
from darkroom_server.engine.output.replay import replay_of
from darkroom_server.engine.sample import Sample

log = structlog.get_logger(__name__)

THREADS = 2


class EncodePool:
    """Encodes finished images and delivers them; Pillow releases the GIL while it compresses."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="encode-image")

    def submit(
        self,
        resident: ResidentJob,
        sample: Sample,
        model: ModelInfo,
        pixels: NDArray[np.uint8],
        *,
        flagged: bool,
    ) -> None:
        """Encode ``pixels`` soon and deliver the image to its job; a flagged one is withheld.

        If an image cannot be encoded, its job fails.
        """
        self._pool.submit(self._encode, resident, sample, model, pixels, flagged)

    def submit_preview(
        self, resident: ResidentJob, sample: Sample, pixels: NDArray[np.uint8]
    ) -> None:
        """Encode a preview soon and deliver it to its job."""
        sample.preview_pending = True
        self._pool.submit(self._encode_preview, resident, sample, sample.step, pixels)

    def close(self) -> None:
        """Finish the images that are being encoded; discard those that wait."""
        self._pool.shutdown(cancel_futures=True)

    def _encode_preview(
        self, resident: ResidentJob, sample: Sample, step: int, pixels: NDArray[np.uint8]
    ) -> None:
        job = sample.job
        try:
            size = preview_size(job.width, job.height)
            data = encode_preview(pixels, size, job.preview_format)
        except Exception:
            log.exception("preview could not be encoded", **job.log_fields)
            return
        finally:
            sample.preview_pending = False
        resident.preview(
            PreviewReady(
                job_id=job.id,
                image_index=sample.index,
                step=step,
                data=data,
                format=job.preview_format,
                width=size[0],
                height=size[1],
            )
        )

    def _encode(
        self,
        resident: ResidentJob,
        sample: Sample,
        model: ModelInfo,
        pixels: NDArray[np.uint8],
        flagged: bool,
    ) -> None:
        job = sample.job
        try:
            replay = replay_of(sample, "" if flagged else sha256_of(pixels))
            record = ""
            if job.embed_record and not flagged:
                record = embedded_record(job, sample.seed, model, replay)
            image = EncodedImage(
                data=b"" if flagged else encode_image(pixels, job.format, job.quality, record),
                format=job.format,
                width=job.width,
                height=job.height,
                seed=sample.seed,
                prompt_truncated=sample.prompt_truncated,
                flagged=flagged,
                replay=replay,
            )
            resident.deliver(sample.index, image)
        except Exception:
            log.exception("image could not be encoded", **job.log_fields)
            resident.end(JobFailed(job.id, ENCODE_FAILED))
