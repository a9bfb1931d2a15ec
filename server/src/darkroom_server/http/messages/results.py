"""From finished jobs to JSON, in OpenAI's shape with our fields beside."""

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from darkroom_server.core.events import StageSeconds
from darkroom_server.core.finished_image import FinishedImage
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.record import embedded_record
from darkroom_server.http.messages.request import ImageRequest
from darkroom_server.http.signed_urls import SignedUrls

TOKEN_PIXELS = 16 * 16
"""Of one output token in ``usage``; OpenAI's best quality counts about as many."""

OFF_LOOP_BYTES = 64 * 1024
"""Larger images are encoded on a thread, so that no other caller waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultWriter:
    """Makes the JSON of one job's images, as ``request`` wants them.

    ``caller`` and ``request_id`` name the job, ``base_url`` is how its caller addresses the server.
    """

    request: ImageRequest
    job: Job
    model: ModelInfo
    caller: str
    request_id: str
    base_url: str
    urls: SignedUrls

    async def response(
        self, images: Sequence[FinishedImage], stages: StageSeconds, total: float
    ) -> bytes:
        """The whole answer; ``total``: seconds since the request arrived."""
        head = {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": self.job.format.value,
            "quality": self.request.quality,
            "size": f"{self.job.width}x{self.job.height}",
            "usage": self.usage(len(images)),
            "darkroom": self.job_fields(stages, total),
        }
        size = sum(len(image.data) for image in images)
        return await off_loop(size, lambda: self._response(head, images))

    def _response(self, head: dict[str, Any], images: Sequence[FinishedImage]) -> bytes:
        data = [self.image(index, image) for index, image in enumerate(images)]
        return json_bytes({**head, "data": data})

    def job_fields(self, stages: StageSeconds, total: float) -> dict[str, Any]:
        """What our own clients read of a job that finished; times in seconds."""
        return {
            "request_id": self.request_id,
            "model": self.model.id,
            "model_revision": self.model.revision,
            "timings": {**asdict(stages), "total": total},
        }

    def image(self, index: int, image: FinishedImage) -> dict[str, Any]:
        """One image, with the record that reproduces it."""
        fields: dict[str, Any] = {
            "seed": image.seed,
            "prompt_truncated": image.prompt_truncated,
            "flagged": image.flagged,
            "record": json.loads(embedded_record(self.job, image.seed, self.model, image.replay)),
        }
        if image.flagged:
            return {"b64_json": None, **fields}
        if self.request.as_urls:
            url = self.urls.make(self.base_url, self.caller, self.request_id, index, image.format)
            return {"url": url, **fields}
        return {"b64_json": base64_text(image.data), **fields}

    def usage(self, images: int) -> dict[str, Any]:
        """The work, in tokens as OpenAI's clients expect it.

        The texts of prompts are not counted: their tokens cost nothing that depends on their
        number.
        """
        tokens = images * -(-self.job.width * self.job.height // TOKEN_PIXELS)
        return {
            "input_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": tokens,
            "total_tokens": tokens,
        }


async def off_loop(size: int, make: Any) -> bytes:
    """The result of ``make``, which takes time in proportion to ``size`` bytes."""
    if size <= OFF_LOOP_BYTES:
        made: bytes = make()
        return made
    return await asyncio.to_thread(make)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """``value`` as JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def base64_text(data: bytes) -> str:
    """``data`` in base64."""
    return base64.b64encode(data).decode("ascii")
