"""How large a reply may get: known before any work is done.

A client with gRPC's default limits fails on a reply of more than 4 MiB, after the work.
"""

from collections.abc import Iterable

from darkroom_server.core.errors import InvalidRequest, Reason, Violation
from darkroom_server.core.job import Job

METADATA_KEY = "darkroom-max-reply-bytes"
"""What a caller that raised its receive limit says, as a decimal number."""

DEFAULT_MAX_REPLY_BYTES = 4 * 1024**2
"""gRPC's default receive limit."""

MAX_REPLY_BYTES = 64 * 1024**2
"""Whatever the caller can take: a whole reply lies in memory until it is read."""

OVERHEAD_BYTES = 64 * 1024
"""More than an image's format and replay record ever take besides its pixels."""


def max_reply_bytes(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """What the caller can take, according to a call's metadata, and the server sends at once.

    Raises ``InvalidRequest``.
    """
    for key, value in metadata:
        if key == METADATA_KEY:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            if not (text.isascii() and text.isdecimal() and len(text) <= 18):
                wrong = Violation(METADATA_KEY, "metadata: must be a number of bytes")
                raise InvalidRequest([wrong])
            return min(int(text), MAX_REPLY_BYTES)
    return DEFAULT_MAX_REPLY_BYTES


def reply_bytes(job: Job) -> int:
    """The most that the reply to ``job`` can take: no format is larger than the pixels are."""
    return job.image_count * (job.width * job.height * 3 + OVERHEAD_BYTES)


def reply_size_error(job: Job, limit: int) -> InvalidRequest | None:
    """The error for a reply that may pass ``limit`` bytes, None for one that cannot."""
    size = reply_bytes(job)
    if size <= limit:
        return None
    if limit >= MAX_REPLY_BYTES:
        why = f"no reply has more than {limit}; ask for fewer or smaller images, or a stream"
    else:
        why = (
            f"the caller takes {limit}; ask for fewer or smaller images, or raise the client's "
            f"gRPC receive limit and send it as metadata {METADATA_KEY}"
        )
    description = (
        f"{job.image_count} of {job.width}×{job.height} pixels may make a reply of {size} bytes, "
        f"and {why}"
    )
    return InvalidRequest([Violation("image_count", description)], Reason.REPLY_TOO_LARGE)
