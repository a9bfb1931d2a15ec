"""One job as its caller sees it, over any number of connections."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from darkroom.v1 import generation_pb2
from darkroom_client._errors import (
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    Overloaded,
    ServerError,
    Unavailable,
    UnknownRequest,
)
from darkroom_client._protocol.rpc_errors import is_bare
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata
from darkroom_client._types.connection import Retry
from darkroom_client._types.events import (
    Accepted,
    Event,
    Finished,
    ImageReady,
    Queued,
    Restarted,
    Started,
)
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult
from darkroom_client._wire.events import (
    ImageAssembly,
    decode_accepted,
    decode_preview,
    decode_progress,
    decode_reason,
)
from darkroom_client._wire.results import decode_timings, unreadable

LONGEST_OUTAGE = 120.0
"""A stream without a timeout fails after that many seconds without any server."""

MAX_BACKENDS_PROBED = 6
"""A job counts as lost after that many UNKNOWN_REQUEST answers in a row: servers behind one name do
not share jobs, and a balanced connection sends each call to the next of them."""

_SEED_BOUND = 2**63


@dataclass(frozen=True, slots=True)
class NextCall:
    """The next call to make."""

    method: Callable[[Stubs], Any]
    message: Message
    timeout: float | None


class GenerationSession:
    """The state of a job at its caller: which call comes next, and what its messages mean.

    It does no I/O (sans-IO), so both clients share it. They make the calls that ``next_call``
    returns, pass each message to ``feed``, and each end of a call to ``on_call_ended``. After a
    lost connection it joins an accepted job again. If the server does not know the job any more,
    it sends the request again with the same id, without the images that have arrived.
    """

    def __init__(
        self,
        request_id: str,
        *,
        address: str,
        timeout: float | None,
        metadata: Metadata,
        retry: Retry,
        request: generation_pb2.GenerateRequest | None = None,
        preview: generation_pb2.PreviewOptions | None = None,
    ) -> None:
        self.request_id = request_id
        self.address = address
        self.timeout = timeout
        self.metadata = metadata
        # The server continues the job after a lost connection: a reader that stops must cancel it.
        self.survives_disconnect = request is not None and retry.attempts > 1
        self.ended = False
        self.result: GenerationResult | None = None
        self._request = request
        self._preview = preview
        self._retry = retry
        self._ends_at: float | None = None
        self._last_event_at = 0.0
        self._failures = 0
        self._unknown = 0
        self._sent = False
        self._job_ended = False
        # The server is assumed to have the job, so the next call is a watch.
        self._joinable = request is None
        # The next call may go to servers whose health says that they accept no jobs.
        self._skip_health_check = False
        self._accepted: Accepted | None = None
        self._server_id = ""
        # Why the last server did not accept the job.
        self._rejection: Unavailable | None = None
        self._started = False
        self._crashes = 0
        self._losses = 0
        # The index in the request of the first image of the job that runs now.
        self._first = 0
        self._assembly = ImageAssembly(request_id)
        self._images: dict[int, Image] = {}

    @property
    def needs_cancel(self) -> bool:
        """Whether the server may still run the job, so a reader that stops must cancel it."""
        return self.survives_disconnect and self._sent and not self._job_ended

    @property
    def server_id(self) -> str:
        """The name of the server that has the job; empty while it is not known."""
        return self._server_id

    def next_call(self) -> NextCall:
        """The call to make now; raises the caller's error if the time is up."""
        now = time.monotonic()
        if self._ends_at is None:
            self._ends_at = math.inf if self.timeout is None else now + self.timeout
            self._last_event_at = now
        remaining = self._ends_at - now
        if remaining <= 0:
            self.ended = True
            raise self._rejection or self._deadline_exceeded()
        self._assembly = ImageAssembly(self.request_id)
        timeout = None if math.isinf(remaining) else remaining
        if self._joinable or self._request is None:
            return watch_call(self.request_id, timeout)
        self._sent = True
        message = generation_pb2.GenerateStreamRequest(
            generation=self._remaining_request(self._request), preview=self._preview
        )
        return generate_call(message, timeout, skip_health_check=self._skip_health_check)

    def feed(self, event: generation_pb2.GenerationEvent) -> list[Event]:
        """Return the caller's events for ``event``; raises ``ServerError`` if it is unreadable."""
        self._failures = self._unknown = 0
        self._rejection = None
        self._last_event_at = time.monotonic()
        try:
            return list(self._decode(event))
        except ServerError:
            self.ended = True
            raise

    def on_call_ended(self, error: DarkroomError | None, *, sent: bool = True) -> float:
        """Return the seconds to wait before ``next_call``; raises ``error`` if it is final.

        ``error`` is None if the call ended with OK before the job did. ``sent``: there was a server
        to send the call to.
        """
        error = error or Unavailable(
            f"the server at {self.address} ended the stream before the generation",
            code="UNAVAILABLE",
            request_id=self.request_id,
        )
        skipped_health_check, self._skip_health_check = self._skip_health_check, False
        if is_bare(error, Unavailable) and not self._joinable and not skipped_health_check:
            # No server accepts jobs, or it was lost: another one gives the reason, or accepts it.
            self._skip_health_check = True
            if not sent:
                return 0.0
        if isinstance(error, UnknownRequest) and self._joinable and self._probe_another_backend():
            # Random, or clients that probe in step would each meet the same backend every time.
            return random.uniform(0.0, 0.02)
        self._failures += 1
        if self._accepted is None and isinstance(error, Unavailable):
            self._rejection = error
        elif self._rejection is not None and is_bare(error, DeadlineExceeded):
            # The deadline passed before a server accepted the job: keep the earlier reason.
            error = self._rejection
        if not self._may_retry(error):
            self.ended = True
            # Every error with a reason is the server's, so the job has ended, except if the server
            # is unavailable. An error without a reason, such as the client's own deadline, is not.
            self._job_ended = bool(error.reason) and not isinstance(error, Unavailable)
            raise error
        return self._pause(error)

    def _probe_another_backend(self) -> bool:
        """Whether to call again at once for a job that the last backend does not know."""
        self._unknown += 1
        if self._unknown < MAX_BACKENDS_PROBED:
            return True
        self._unknown = 0
        if self._request is None:
            return False
        # Its server restarted: send the request again.
        self._joinable = False
        self._losses += 1
        return True

    def _may_retry(self, error: DarkroomError) -> bool:
        """Whether to call again: some times, and for an accepted job until the time is up."""
        if self.timeout is None and time.monotonic() - self._last_event_at > LONGEST_OUTAGE:
            return False
        accepted = self._accepted is not None
        if isinstance(error, Unavailable) and accepted and self._retry.attempts > 1:
            return True
        if isinstance(error, Overloaded):
            # The job lost its place in the queue when its server restarted.
            return self._losses > 0 and not self._joinable
        # gRPC's own errors for a connection that broke during the call, such as "Stream removed".
        # A server that shuts down before it has accepted the job ends the call with CANCELLED.
        lost = isinstance(error, Unavailable) or is_bare(error, Cancelled)
        lost = lost or (accepted and is_bare(error, ServerError))
        return lost and self._failures < self._retry.attempts

    def _pause(self, error: DarkroomError) -> float:
        """Seconds until the next call; raises ``error`` if there is no time for one."""
        grown = self._retry.initial_backoff * self._retry.multiplier ** (self._failures - 1)
        backoff = min(grown, self._retry.max_backoff) * random.uniform(0.8, 1.2)
        wait = error.retry_after or backoff
        remaining = (self._ends_at or math.inf) - time.monotonic()
        if wait >= remaining and self._accepted is None:
            self.ended = True
            raise error
        return max(0.0, min(wait, remaining))

    def _deadline_exceeded(self) -> DarkroomError:
        return DeadlineExceeded(
            f"not finished within {self.timeout:g} s: pass a longer timeout, or ask for fewer "
            "steps or images",
            code="DEADLINE_EXCEEDED",
            request_id=self.request_id,
        )

    def _remaining_request(
        self, request: generation_pb2.GenerateRequest
    ) -> generation_pb2.GenerateRequest:
        """``request`` without the images at its start and end that have arrived."""
        count = request.image_count if request.HasField("image_count") else 1
        missing = [index for index in range(count) if index not in self._images]
        if not self._images or not missing:
            self._first = 0
            return request
        self._first = missing[0]
        rest = generation_pb2.GenerateRequest()
        rest.CopyFrom(request)
        rest.seed = (request.seed + self._first) % _SEED_BOUND
        rest.image_count = missing[-1] - self._first + 1
        return rest

    def _decode(self, event: generation_pb2.GenerationEvent) -> Iterator[Event]:
        match event.WhichOneof("event"):
            case "accepted":
                yield from self._decode_accepted(decode_accepted(event.accepted))
            case "queued":
                if not self._started:
                    yield Queued(position=event.queued.position)
            case "started":
                if not self._started:
                    self._started = True
                    yield Started()
            case "restarted":
                if event.restarted.crashes > self._crashes:
                    self._crashes = event.restarted.crashes
                    yield self._restarted()
            case "progress":
                yield decode_progress(event.progress, self._first)
            case "preview":
                if (preview := decode_preview(event.preview, self._first)) is not None:
                    yield preview
            case "image":
                yield from self._decode_image(event.image)
            case "finished":
                yield self._decode_finished(event.finished)
        # Events that are newer than this client are ignored.

    def _decode_accepted(self, accepted: Accepted) -> Iterator[Event]:
        self._server_id = accepted.server_id
        if self._accepted is None:
            self._accepted = accepted
            yield accepted
        elif not self._joinable and not accepted.joined:
            self._crashes = 0
            yield self._restarted()
        self._joinable = True

    def _restarted(self) -> Restarted:
        self._started = False
        return Restarted(times=self._crashes + self._losses)

    def _decode_image(self, chunk: generation_pb2.ImageChunk) -> Iterator[Event]:
        whole = self._assembly.add(chunk)
        if whole is None:
            return
        index, image = whole[0] + self._first, whole[1]
        if index not in self._images:
            self._images[index] = image
            yield ImageReady(image_index=index, image=image)

    def _decode_finished(self, finished: generation_pb2.Finished) -> Finished:
        expected = len(self._accepted.seeds) if self._accepted is not None else len(self._images)
        if self._assembly.busy or sorted(self._images) != list(range(expected)):
            raise unreadable(
                f"{len(self._images)} whole images, but {expected} were announced",
                self.request_id,
            )
        self.result = GenerationResult(
            request_id=self.request_id,
            images=tuple(self._images[index] for index in range(expected)),
            timings=decode_timings(finished.timings),
            model=finished.model,
            model_revision=finished.model_revision,
        )
        self.ended = self._job_ended = True
        return Finished(reason=decode_reason(finished), result=self.result)


def watch_call(request_id: str, timeout: float | None) -> NextCall:
    """Follow a job that exists."""
    message = generation_pb2.WatchGenerationRequest(request_id=request_id)
    return NextCall(lambda stubs: stubs.generation.WatchGeneration, message, timeout)


def generate_call(
    message: generation_pb2.GenerateStreamRequest, timeout: float | None, *, skip_health_check: bool
) -> NextCall:
    """Start a job: at a server whose health says that it accepts jobs, or at any server."""
    if skip_health_check:
        return NextCall(lambda stubs: stubs.generation.GenerateStream, message, timeout)
    return NextCall(lambda stubs: stubs.health_checked_generation.GenerateStream, message, timeout)
