"""The blocking client."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from darkroom_client import _batch
from darkroom_client._errors import DarkroomError
from darkroom_client._model_methods import ModelMethods
from darkroom_client._protocol.calls import Calls, replayed
from darkroom_client._protocol.pacing import BatchPacer
from darkroom_client._protocol.readiness import REQUEST, Readiness
from darkroom_client._settings import (
    DEFAULT_KEEPALIVE,
    DEFAULT_MAX_REPLY_BYTES,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT,
    Settings,
)
from darkroom_client._stream import Stream
from darkroom_client._transport.sync import SyncTransport
from darkroom_client._types.connection import TLS, Keepalive, Retry
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.events import Accepted
from darkroom_client._types.inputs import ImageSource
from darkroom_client._types.job import Job
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.request import GenerationOptions, GenerationRequest, as_request
from darkroom_client._types.result import GenerationResult
from darkroom_client._types.status import Estimate, ServerStatus


class Client(ModelMethods):
    """A connection to a Darkroom server; safe to share between threads, not to fork once in use.

    ``target``: host:port, or any gRPC target; if unset, DARKROOM_TARGET or 127.0.0.1:50051. With
    several addresses (a list, or one string with commas) each new job goes to the better of two
    servers picked at random, by the load that they report; calls about it go to the same server.
    ``token``: sent as a bearer token; if unset, DARKROOM_TOKEN. A token over plaintext is an error
    unless ``insecure`` is true. ``tls``: if unset, DARKROOM_CA names the file of ``TLS.ca``; with
    neither, the connection is plaintext. ``timeout``: seconds that a call may take, retries
    included; 120 by default, None for no limit. ``max_reply_bytes``: the server rejects, before it
    generates, a request whose images do not fit in a reply of that size.

    Every method takes its own ``timeout``, and ``metadata`` to send with the call. A request is a
    prompt with the fields of ``GenerationRequest`` as keyword arguments, or a
    ``GenerationRequest``. Each error of a call is a ``DarkroomError``; its class says what to do.

    The connection opens at the first call, and reconnects when it breaks. Raises ``ValueError``
    for settings that contradict each other, ``OSError`` for a file that cannot be read. A process
    that was forked after the first call needs its own client.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        insecure: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
        keepalive: Keepalive = DEFAULT_KEEPALIVE,
        retry: Retry = DEFAULT_RETRY,
        max_reply_bytes: int = DEFAULT_MAX_REPLY_BYTES,
    ) -> None:
        self._settings = Settings.resolve(
            target=target,
            token=token,
            tls=tls,
            insecure=insecure,
            timeout=timeout,
            keepalive=keepalive,
            retry=retry,
            max_reply_bytes=max_reply_bytes,
        )
        self._calls = Calls(self._settings)
        self._transport = SyncTransport(self._settings)

    @property
    def target(self) -> str:
        """The address of the server."""
        return self._settings.target

    def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Generate images and wait for them.

        If the server is unavailable or the connection is lost, the call is retried with the same
        id and seed: it joins the running job, or generates the same images. If the caller stops
        waiting (a timeout, an interrupt), the job is cancelled.
        """
        request = as_request(prompt, options)
        return self._transport.run(self._calls.generate(request, timeout, metadata))

    def stream(
        self,
        prompt: str | GenerationRequest,
        *,
        preview_every: int = 0,
        preview_format: ImageFormat | str = ImageFormat.JPEG,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Generate images and yield events meanwhile: ``with client.stream(...) as stream``.

        The call begins when the first event is read. ``preview_every``: emit a small picture of
        each unfinished image every N steps; 0 for none. The end of the block cancels an unfinished
        job.
        """
        self._transport.check_open()
        request = as_request(prompt, options)
        session = self._calls.stream(request, preview_every, preview_format, timeout, metadata)
        return Stream(self._transport, session)

    def replay(
        self,
        record: ReplayRecord,
        *,
        images: Iterable[ImageSource] = (),
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Reproduce the image of ``record``, under a new request id.

        It is the same image if ``pixels_sha256`` of both records is equal. ``images``: the files
        that the first request brought, in any order, which the record names by their digests;
        without them, ``UploadNotFound`` if the server does not have them any more. Raises
        ``ValueError`` for an image that the record does not name.
        """
        request = replayed(record, images)
        return self._transport.run(self._calls.generate(request, timeout, metadata))

    def generate_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult | DarkroomError]:
        """Send many requests, at most ``concurrency`` at a time, and wait for all.

        A string is a prompt; ``options`` are for all, and override those of a
        ``GenerationRequest``. The answers are in the order of ``requests``; the answer of a request
        that failed is its error, and the others continue.

        If the server cannot accept more now (a full queue, a used-up quota, a deadline that the
        queue makes unreachable), requests wait for ``retry_after``, or until one of the others has
        ended, and fewer are sent at a time. ``timeout`` is for each request; a rejected one is as
        if it had not been sent, and fails if no request of the batch ends for that long.
        """
        answers = self.generate_as_completed(
            requests, concurrency=concurrency, timeout=timeout, metadata=metadata, **options
        )
        return _batch.in_order(answers)

    def generate_as_completed(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[tuple[int, GenerationResult | DarkroomError]]:
        """Like ``generate_many``, but yield each answer with its index as soon as it is there.

        Requests are read from the iterable on demand. The end of the loop cancels what runs.
        """
        self._transport.check_open()
        calls = _batch.prepare(
            lambda request: self._calls.generate(request, timeout, metadata),
            _batch.with_options(requests, options),
        )
        concurrency = _batch.check_concurrency(concurrency)
        pacer = BatchPacer(concurrency, self._settings.deadline(timeout), self._settings.retry)
        return _batch.generate_many(self._transport, calls, pacer)

    def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        time_limit: float | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Accepted:
        """Start a job and return at once; ``watch`` gets its images by ``request_id``.

        ``time_limit``: seconds until the job's deadline; ``timeout`` is for this call only. The
        server keeps the result for its ``--result-ttl``.
        """
        request = as_request(prompt, options)
        return self._transport.run(self._calls.submit(request, time_limit, timeout, metadata))

    def watch(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Stream:
        """Follow a job of this caller: its events, from ``Accepted`` on.

        Finished images are sent again, progress is not. The end of the block does not cancel the
        job. The first event raises ``UnknownRequest`` for an id that the server does not know.
        """
        self._transport.check_open()
        return Stream(self._transport, self._calls.watch(request_id, timeout, metadata))

    def result(
        self,
        request_id: str,
        timeout: float | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Wait for a job of this caller that an earlier call began, and return its images.

        The job continues if this call times out. Raises the job's error if it did not finish, and
        ``UnknownRequest`` for an id that the server does not know.
        """
        return self.watch(request_id, timeout=timeout, metadata=metadata).result()

    def job(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Return the state, step and place in the queue of a job of this caller, without waiting.

        Raises ``UnknownRequest`` for an id that the server does not know.
        """
        return self._transport.run(self._calls.job(request_id, timeout, metadata))

    def jobs(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> Iterator[Job]:
        """Yield the jobs of this caller that the server knows, the last accepted first.

        The jobs come in pages, each read when it is needed; ``timeout`` is for each page. A server
        knows the jobs that it runs, and ended ones for its ``--result-ttl``.
        """
        token, more = "", True
        while more:
            page = self._transport.run(self._calls.jobs(token, timeout, metadata))
            yield from page.jobs
            token = page.next_token
            more = bool(token)

    def cancel(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Cancel a job of this caller at its next step, also if others wait for it.

        False if it had ended before. Raises ``UnknownRequest`` for an id that the server does not
        know.
        """
        return self._transport.run(self._calls.cancel(request_id, timeout, metadata))

    def estimate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Estimate:
        """Estimate what a request would take now, in seconds and bytes, without running it."""
        request = as_request(prompt, options)
        return self._transport.run(self._calls.estimate(request, timeout, metadata))

    def status(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> ServerStatus:
        """Return the server's state, queue, engines and memory."""
        return self._transport.run(self._calls.status(timeout, metadata))

    def wait_until_ready(
        self, timeout: float | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Wait until the server is up and its models are loaded and warmed up.

        Raises ``Unavailable`` after ``timeout`` seconds (if unset, the client's).
        """
        self._transport.check_open()
        wait = Readiness(self.target, self._settings.deadline(timeout))
        sent = self._settings.metadata(metadata)
        while True:
            watch = self._transport.stubs.health.Watch(
                REQUEST, timeout=wait.remaining, metadata=sent, wait_for_ready=True
            )
            try:
                if any(wait.saw(response) for response in watch):
                    return
            except grpc.RpcError as error:
                wait.failed(error)
            finally:
                watch.cancel()
            wait.check()
            time.sleep(wait.pause)

    def close(self) -> None:
        """Cancel every job in flight, also on the server, and disconnect. Idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r})"
