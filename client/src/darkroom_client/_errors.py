"""Every error of a call, as a tree split by what the caller can do about it.

DarkroomError
├── InvalidRequest      correct the request: `violations` lists every error in it
│   └── UploadNotFound  the server does not have an image: send the image itself
├── ModelNotFound       use another model
├── ModelUnusable       the server cannot load the model: use another one; the text says why
├── ModelDoesNotFit     the models that must stay leave it too little memory: unpin one
├── AdapterNotFound     use another adapter
├── AdapterUnusable     the server cannot offer the adapter as it is now; the text says why
├── UnknownRequest      the server does not know that request id, or not any more
├── TooLarge            ask for less, or use a bigger machine: it never fits this one
├── ReplyTooLarge       ask for fewer or smaller images, or raise the client's `max_reply_bytes`
├── Overloaded          the same request works later: wait `retry_after` seconds
├── QuotaExceeded       this caller has used up its quota
├── Unavailable         no server answers, or it is loading or shutting down: check, then retry
│   └── TLSError        the two ends do not agree on TLS: correct `tls=TLS(...)`
├── DeadlineExceeded    use a longer `timeout` (at least `needed`), or ask for less
│   └── DeadlineUnreachable   the same, and the server rejected the request before any work
├── Unauthenticated     use a valid token
├── PermissionDenied    ask the operator for permission
├── GenerationFailed    the job was accepted and failed; `reason` says why
├── ImageWithheld       the safety checker withheld the pixels: ask for something else
├── Cancelled           the call was cancelled, here or on the server's side
├── Unsupported         the server does not offer this call: the versions differ
└── ServerError         the server is broken: give its operator the `request_id`

Wrong use of the library itself raises Python's own errors: ``TypeError``, ``ValueError``,
``FileExistsError``, and ``RuntimeError`` for a client that is closed.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One error in one field of a request, and what is valid."""

    field: str
    description: str


class DarkroomError(Exception):
    """The root of the tree; ``str()`` of an instance is a sentence for people.

    ``code``: the name of the gRPC status, such as "UNAVAILABLE". ``reason``: the server's more
    precise word, such as "MODEL_LOADING"; empty if it sent none. ``request_id``: the id of the
    call in the server's logs; None for a call without one. ``retry_after``: seconds to wait before
    a retry; None if the server sent none. ``violations``: the errors in the request, by field.
    ``metadata``: numbers that belong to the reason.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        request_id: str | None = None,
        retry_after: float | None = None,
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after = retry_after
        self.violations = violations
        self.metadata = dict(metadata or {})


class InvalidRequest(DarkroomError):
    """The request is invalid; ``violations`` lists all errors at once."""


class UploadNotFound(InvalidRequest):
    """The server does not have an image that the request names: send the image itself.

    The client sends an image again by itself if it has it. ``upload_ids`` are those that it does
    not have.
    """

    @property
    def upload_ids(self) -> tuple[str, ...]:
        """The names of the missing images, "sha256:" and the digest of the file."""
        return tuple(filter(None, self.metadata.get("upload_ids", "").split(",")))


class ModelNotFound(DarkroomError):
    """The server has no model of that name."""


class ModelUnusable(DarkroomError):
    """The server cannot load the model; the message says why. ``Client.load_model`` tries again."""


class ModelDoesNotFit(DarkroomError):
    """The models that must stay in memory leave the model too little: unpin or unload one."""


class AdapterNotFound(DarkroomError):
    """The server has no adapter of that name."""


class AdapterUnusable(DarkroomError):
    """The adapter cannot be added: it fits no model, or jobs use one of its name.

    Of a generation: the adapter's file was damaged or removed since the server offered it.
    """


class UnknownRequest(DarkroomError):
    """The server does not know that request id, or does not keep its result any more."""


class TooLarge(DarkroomError):
    """The request never fits this server's memory, even alone."""


class ReplyTooLarge(DarkroomError):
    """The images would not fit in one reply."""


class Overloaded(DarkroomError):
    """The server's queue is full; try again after ``retry_after``."""


class QuotaExceeded(DarkroomError):
    """This caller has used up its quota."""


class Unavailable(DarkroomError):
    """No server answers, or it is loading or shutting down."""


class TLSError(Unavailable):
    """The two ends do not agree on TLS: the message says on what, and what to change.

    A retry does not help, so there is none.
    """


class DeadlineExceeded(DarkroomError):
    """The deadline passed before the images were done, or would have: ``DeadlineUnreachable``."""

    @property
    def needed(self) -> float | None:
        """The ``timeout`` in seconds that would be accepted; None if the server did not send it."""
        return self._figure("needed_seconds")

    @property
    def estimate(self) -> float | None:
        """Seconds that the request would take in total; None if the server did not send it."""
        return self._figure("estimate_seconds")

    @property
    def queue_wait(self) -> float | None:
        """Estimated seconds before the first step; None if the server did not send it."""
        return self._figure("queue_wait_seconds")

    def _figure(self, key: str) -> float | None:
        try:
            return float(self.metadata[key])
        except (KeyError, ValueError):
            return None


class DeadlineUnreachable(DeadlineExceeded):
    """The server rejected the request at once: the deadline would pass before the images were done.

    It sends its estimate. Later, when fewer jobs wait, the same deadline may suffice.
    """


class Unauthenticated(DarkroomError):
    """The server requires a token, or rejects this one."""


class PermissionDenied(DarkroomError):
    """The caller is known, and is not allowed to make this call."""


class GenerationFailed(DarkroomError):
    """The server accepted the request, and the job failed; ``reason`` says why."""


class ImageWithheld(DarkroomError):
    """The safety checker flagged the image, and its pixels stayed on the server."""


class Cancelled(DarkroomError):
    """The call was cancelled, here or on the server's side."""


class Unsupported(DarkroomError):
    """The server does not offer this call: client and server are of different versions."""


class ServerError(DarkroomError):
    """The server is broken, or its reply cannot be read."""
