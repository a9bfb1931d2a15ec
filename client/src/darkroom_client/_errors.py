"""Every error of a call, as a tree split by what the caller can do about it.

DarkroomError
├── InvalidRequest      mend the request: `violations` lists everything that is wrong with it
├── ModelNotFound       name another model
├── UnknownRequest      no generation of that id is known to the server, or known any more
├── TooLarge            ask for less, or ask a bigger machine: it never fits this one
├── ReplyTooLarge       ask for fewer or smaller images, or raise the client's `max_reply_bytes`
├── Overloaded          the same request works later: wait `retry_after` seconds
├── QuotaExceeded       this caller has used up its share
├── Unavailable         nobody answers, or the server is loading or going away: look, then retry
├── DeadlineExceeded    give more `timeout` (at least `needed`), or ask for less
├── Unauthenticated     bring a valid token
├── PermissionDenied    ask the operator for leave
├── GenerationFailed    accepted, and could not be finished; `reason` says why
├── ImageWithheld       the safety checker kept the pixels back: ask for something else
├── Cancelled           the call was cancelled, here or on the server's side
├── Unsupported         the server does not offer this call: the versions differ
└── ServerError         the server is broken: tell its operator the `request_id`

Wrong use of the library itself raises Python's own errors: ``TypeError``, ``ValueError``,
``FileExistsError``, and ``RuntimeError`` for a client that is closed.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing wrong with one field of a request, and what would be right."""

    field: str
    description: str


class DarkroomError(Exception):
    """The root of the tree; ``str()`` of an instance is a sentence for the reader.

    ``code``: the name of the gRPC status, such as "UNAVAILABLE". ``reason``: the server's own
    finer word, such as "MODEL_LOADING"; empty where it gave none. ``request_id``: names the call
    in the server's logs; None for a call that has no such id. ``retry_after``: seconds after
    which trying again makes sense; None where the server named none. ``violations``: what is
    wrong with the request, field by field. ``metadata``: figures that go with the reason.
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
    """The request is wrong; ``violations`` lists everything that is, at once."""


class ModelNotFound(DarkroomError):
    """The server holds no model of that name."""


class UnknownRequest(DarkroomError):
    """The server knows no generation of that id, or does not keep its result any more."""


class TooLarge(DarkroomError):
    """The request never fits this server's memory, even alone."""


class ReplyTooLarge(DarkroomError):
    """The images would not fit in one reply."""


class Overloaded(DarkroomError):
    """The server has accepted as much as it will hold; try again after ``retry_after``."""


class QuotaExceeded(DarkroomError):
    """This caller has used up its share of the server."""


class Unavailable(DarkroomError):
    """Nobody answers, or the server is loading or going away."""


class DeadlineExceeded(DarkroomError):
    """The deadline passed, or would have passed before the images were done.

    A server that can tell in advance refuses at once, and says what the request would take.
    """

    @property
    def needed(self) -> float | None:
        """Seconds of ``timeout`` that would be let in, None where the server did not say."""
        return self._figure("needed_seconds")

    @property
    def estimate(self) -> float | None:
        """Seconds that the request would take in all, None where the server did not say."""
        return self._figure("estimate_seconds")

    @property
    def queue_wait(self) -> float | None:
        """Seconds of the estimate before the first step, None where the server did not say."""
        return self._figure("queue_wait_seconds")

    def _figure(self, key: str) -> float | None:
        try:
            return float(self.metadata[key])
        except (KeyError, ValueError):
            return None


class Unauthenticated(DarkroomError):
    """The server wants a token, or does not take this one."""


class PermissionDenied(DarkroomError):
    """The server knows the caller, and does not allow this call."""


class GenerationFailed(DarkroomError):
    """The server accepted the request and could not finish it; ``reason`` says why."""


class ImageWithheld(DarkroomError):
    """The safety checker flagged the image, and its pixels stayed on the server."""


class Cancelled(DarkroomError):
    """The call was cancelled, here or on the server's side."""


class Unsupported(DarkroomError):
    """The server does not offer this call: client and server are of different versions."""


class ServerError(DarkroomError):
    """The server is broken, or its reply cannot be read."""
