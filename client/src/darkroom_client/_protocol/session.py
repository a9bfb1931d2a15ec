"""One job as its caller sees it, over any number of connections."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import grpc

from darkroom.v1 import generation_pb2
from darkroom_client._errors import (
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    Overloaded,
    ServerError,
    TLSError,
    Unavailable,
    UnknownRequest,
)
from darkroom_client._protocol.mixed_images import warn_if_mixed
from darkroom_client._protocol.retries import NextCall, Retries, log
from darkroom_client._protocol.rpc_errors import from_rpc_error, is_bare
from darkroom_client._protocol.uploads import Upload, UploadState
from darkroom_client._settings import Metadata
from darkroom_client._types.connection import Retry
from darkroom_client._types.events import (
    Accepted,
    Event,
    Finished,
    ImageReady,
    Queued,
    Reconnecting,
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

MAX_BACKENDS_PROBED = 6
"""A job counts as lost after that many UNKNOWN_REQUEST answers in a row: servers behind one name do
not share jobs, and a balanced connection sends each call to the next of them."""

_SEED_BOUND = 2**63


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait ``seconds`` before the next call; ``event`` is for the caller, before that."""

    seconds: float
    event: Reconnecting | None = None


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
        uploads: tuple[Upload, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.address = address
        self.timeout = timeout
        self.metadata = metadata
        # The server continues the job after a lost connection: a reader that stops must cancel it.
        self.survives_disconnect = request is not None and retry.enabled
        self.ended = False
        self.result: GenerationResult | None = None
        self._request = request
        self._preview = preview
        self._uploads = UploadState(uploads)
        self._retries = Retries(
            "WatchGeneration" if request is None else "GenerateStream",
            retry=retry,
            timeout=timeout,
            address=address,
            request_id=request_id,
        )
        self._unknown = 0
        self._sent = False
        self._job_ended = False
        # The server is assumed to have the job, so the next call is a watch.
        self._joinable = request is None
        # The next call may go to servers whose health says that they accept no jobs.
        self._skip_health_check = False
        self._accepted: Accepted | None = None
        self._server_id = ""
        self._queue_position = 0
        self._started = False
        # The last step of each image that has begun: (step, steps), by index.
        self._steps: dict[int, tuple[int, int]] = {}
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

    @property
    def remaining(self) -> float:
        """The remaining seconds of the call; infinite without a timeout."""
        return self._retries.remaining

    def failure(self, error: grpc.RpcError, tls_problem: str) -> DarkroomError:
        """``error`` as the client's own error; ``tls_problem`` as in ``CallTries``."""
        failure = from_rpc_error(
            error, address=self.address, timeout=self.timeout, request_id=self.request_id
        )
        if tls_problem:
            return TLSError(tls_problem, code=failure.code, request_id=self.request_id)
        return failure

    def next_call(self) -> NextCall:
        """The call to make now; raises the caller's error if the time is up."""
        if self._retries.remaining <= 0:
            raise self._final(self._retries.outage or self._deadline_exceeded())
        self._assembly = ImageAssembly(self.request_id)
        if self._joinable or self._request is None:
            return watch_call(self.request_id, self._retries.begin("WatchGeneration"))
        timeout = self._retries.begin("GenerateStream")
        self._sent = True
        message = generation_pb2.GenerateStreamRequest(
            generation=self._remaining_request(self._request), preview=self._preview
        )
        call = generate_call(message, timeout, skip_health_check=self._skip_health_check)
        return replace(call, uploads=self._uploads.take())

    def feed(self, event: generation_pb2.GenerationEvent) -> list[Event]:
        """Return the caller's events for ``event``; raises ``ServerError`` if it is unreadable."""
        self._unknown = 0
        self._retries.answered()
        try:
            return list(self._decode(event))
        except ServerError:
            self.ended = True
            raise

    def on_call_ended(
        self,
        error: DarkroomError | None,
        *,
        sent: bool = True,
        connected: bool = True,
    ) -> Pause:
        """Return the pause before ``next_call``; raises the caller's error if it is final.

        ``error`` is None if the call ended with OK before the job did. ``sent``: there was a server
        to send the call to; ``connected``: there is a connection to one now.
        """
        error = error or Unavailable(
            f"the server at {self.address} ended the stream before the generation",
            code="UNAVAILABLE",
            request_id=self.request_id,
        )
        skipped_health_check, self._skip_health_check = self._skip_health_check, False
        checked = not self._joinable and not skipped_health_check
        if checked and is_bare(error, Unavailable) and not isinstance(error, TLSError):
            # No server accepts jobs, or it was lost: another one gives the reason, or accepts it.
            self._skip_health_check = True
            if not sent:
                return Pause(0.0)
        if self._uploads.lost(error):
            return Pause(0.0)
        if isinstance(error, UnknownRequest) and self._joinable and self._probe_another_backend():
            # Random, or clients that probe in step would each meet the same backend every time.
            return Pause(random.uniform(0.0, 0.02))
        if is_bare(error, DeadlineExceeded):
            if self._accepted is not None and connected:
                error = self._deadline_exceeded()
            raise self._final(self._retries.expired(error, connected=connected))
        self._retries.failed(error)
        if not self._may_retry(error):
            raise self._final(error)
        try:
            seconds = self._retries.pause(error)
        except DarkroomError as late:
            raise self._final(late) from None
        reason = error.reason or error.code
        return Pause(seconds, Reconnecting(attempt=self._retries.failures, reason=reason))

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
        """Whether to call again if there is time."""
        if isinstance(error, Overloaded):
            # The job lost its place in the queue when its server restarted.
            return self._losses > 0 and not self._joinable
        accepted = self._accepted is not None
        # gRPC's own errors for a connection that broke during the call, such as "Stream removed".
        # A server that shuts down before it has accepted the job ends the call with CANCELLED.
        lost = isinstance(error, Unavailable) or is_bare(error, Cancelled)
        lost = lost or (accepted and is_bare(error, ServerError))
        return lost and self._retries.allowed(error, accepted=accepted)

    def _final(self, error: DarkroomError) -> DarkroomError:
        """``error``, which ends the stream; for an accepted job it says how far that was."""
        self.ended = True
        # Every error with a reason is the server's, so the job has ended, except if the server is
        # unavailable. An error without a reason, such as the client's own deadline, is not.
        self._job_ended = bool(error.reason) and not isinstance(error, Unavailable)
        log.debug("%s: request id %s failed: %s", self.address, self.request_id, error)
        if self._accepted is not None:
            error.args = (f"{error} ({self._how_far(self._accepted)})",)
        return error

    def _how_far(self, accepted: Accepted) -> str:
        """How far the job was at its last event."""
        count = len(accepted.seeds)
        done = f"{len(self._images)} of {count} images had arrived"
        running = {index: step for index, step in self._steps.items() if index not in self._images}
        if running:
            step, steps = max(running.values())
            return f"the job was at step {step} of {steps}; {done}"
        if self._started:
            return f"the job had started; {done}"
        return f"the job was accepted, with {self._queue_position} jobs before it; {done}"

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
                    self._queue_position = event.queued.position
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
                progress = decode_progress(event.progress, self._first)
                self._steps[progress.image_index] = (progress.step, progress.steps)
                yield progress
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
            self._queue_position = accepted.queue_position
            yield accepted
        elif not self._joinable and not accepted.joined:
            self._crashes = 0
            yield self._restarted()
        self._joinable = True

    def _restarted(self) -> Restarted:
        self._started = False
        self._steps.clear()
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
        if expected > 1:
            warn_if_mixed(self.result, self.address)
        self.ended = self._job_ended = True
        return Finished(reason=decode_reason(finished), result=self.result)


def watch_call(request_id: str, timeout: float | None) -> NextCall:
    """Follow a job that exists."""
    message = generation_pb2.WatchGenerationRequest(request_id=request_id)
    return NextCall(
        "WatchGeneration", lambda stubs: stubs.generation.WatchGeneration, message, timeout
    )


def generate_call(
    message: generation_pb2.GenerateStreamRequest, timeout: float | None, *, skip_health_check: bool
) -> NextCall:
    """Start a job: at a server whose health says that it accepts jobs, or at any server."""
    if skip_health_check:
        return NextCall(
            "GenerateStream", lambda stubs: stubs.generation.GenerateStream, message, timeout
        )
    return NextCall(
        "GenerateStream",
        lambda stubs: stubs.health_checked_generation.GenerateStream,
        message,
        timeout,
    )
