"""The size limit of a reply in one message, checked before any work is done."""

from dataclasses import dataclass

from darkroom_server.core.errors import InvalidRequest, Reason, Violation
from darkroom_server.core.job import Job

MAX_REPLY_BYTES = 64 * 1024**2
"""Whatever the caller accepts: a whole reply stays in memory until it is read."""

OVERHEAD_BYTES = 64 * 1024
"""More than an image's format and replay record ever take besides its pixels."""


def reply_bytes(job: Job) -> int:
    """The most bytes of the reply to ``job``: no format makes an image larger than its pixels."""
    return job.image_count * (job.width * job.height * 3 + OVERHEAD_BYTES)


@dataclass(frozen=True, slots=True)
class ReplyLimit:
    """What the caller accepts in one message; ``advice`` says how to raise it over its door."""

    max_bytes: int
    advice: str

    def check(self, job: Job) -> None:
        """Raise ``InvalidRequest`` if the reply to ``job`` may be larger."""
        limit = min(self.max_bytes, MAX_REPLY_BYTES)
        size = reply_bytes(job)
        if size <= limit:
            return
        if limit == MAX_REPLY_BYTES:
            why = f"no reply has more than {limit}; ask for fewer or smaller images, or a stream"
        else:
            why = f"the caller takes {limit}; ask for fewer or smaller images, or {self.advice}"
        description = (
            f"{job.image_count} of {job.width}×{job.height} pixels may make a reply of {size} "
            f"bytes, and {why}"
        )
        raise InvalidRequest([Violation("image_count", description)], Reason.REPLY_TOO_LARGE)
