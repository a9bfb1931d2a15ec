"""The blocking client."""

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self, Unpack

import grpc

from darkroom_client._batch import check_concurrency, check_requests, draw_many, in_order
from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.calls import Calls, replayed
from darkroom_client._protocol.readiness import REQUEST, Readiness
from darkroom_client._settings import (
    DEFAULT_KEEPALIVE,
    DEFAULT_MAX_REPLY_BYTES,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT,
    Settings,
)
from darkroom_client._stream import Stream
from darkroom_client._transport.sync import InFlightCall, SyncTransport
from darkroom_client._types.connection import TLS, Keepalive, Retry
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.events import Accepted
from darkroom_client._types.model import Model
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.request import GenerationOptions, GenerationRequest, as_request
from darkroom_client._types.result import GenerationResult
from darkroom_client._types.status import Estimate, ServerStatus


class Client:
    """A connection to a Darkroom server; safe to share between threads, not to fork once in use.

    ``target``: host:port, or any gRPC target; unset, DARKROOM_TARGET, else 127.0.0.1:50051.
    ``token``: sent as a bearer token; unset, DARKROOM_TOKEN. A token is refused over plaintext
    unless ``insecure`` is true. ``tls``: unset, DARKROOM_CA names the file of ``TLS.ca``; with
    neither the connection is plaintext. ``timeout``: seconds that a call may take, retries
    included, 120 by default; None for no limit. ``max_reply_bytes``: the server refuses, before
    it draws, what would not fit into a reply of that size.

    Every verb takes a ``timeout`` of its own, and ``metadata`` to send along. What is to be drawn
    is a prompt with the fields of ``GenerationRequest`` as keyword arguments, or such a request.
    Errors are ``DarkroomError``; their tree says what to do.

    The connection opens at the first call and comes back by itself when it breaks. Raises
    ``ValueError`` for settings that contradict each other, ``OSError`` for a file that cannot be
    read. A process that was forked after the first call needs a client of its own.
    """

    def __init__(
        self,
        target: str | None = None,
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
        """The address that this client talks to."""
        return self._settings.target

    def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Draw images and wait for them.

        A try that meets an unavailable server or loses its connection is made again under the
        same id and seed: it joins the first or draws the same picture. Who stops waiting (a
        timeout, an interrupt) has the server stop drawing.
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
        """Draw images and tell what happens meanwhile: ``with client.stream(...) as stream``.

        The call begins with the first event that is read. ``preview_every``: a small picture of
        each image every so many steps; 0 for none. Leaving the block cancels what is unfinished.
        """
        self._transport.check_open()
        request = as_request(prompt, options)
        session = self._calls.stream(request, preview_every, preview_format, timeout, metadata)
        return Stream(self._transport, session)

    def replay(
        self,
        record: ReplayRecord,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Draw the image of ``record`` again, under a request id of its own.

        It is the same image when ``pixels_sha256`` of both records agree.
        """
        return self._transport.run(self._calls.generate(replayed(record), timeout, metadata))

    def generate_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[GenerationResult | DarkroomError]:
        """Draw many requests, at most ``concurrency`` at a time, and wait for all.

        The answers come in the order of ``requests``, a string being a prompt; one that failed
        is its error, and costs the others nothing. ``timeout`` counts for each request.
        """
        answers = self.generate_as_completed(
            requests, concurrency=concurrency, timeout=timeout, metadata=metadata
        )
        return in_order(answers)

    def generate_as_completed(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[tuple[int, GenerationResult | DarkroomError]]:
        """As ``generate_many``, each answer with its place in ``requests`` as soon as it is there.

        Requests are drawn from the iterable on demand. Leaving the loop cancels what runs.
        """

        def start(request: GenerationRequest) -> InFlightCall[GenerationResult]:
            return self._transport.start(self._calls.generate(request, timeout, metadata))

        self._transport.check_open()
        return draw_many(start, check_requests(requests), check_concurrency(concurrency))

    def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        time_limit: float | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Accepted:
        """Have images drawn while nobody waits; ``watch`` fetches them by ``request_id``.

        ``time_limit``: seconds from now after which the server gives up; ``timeout`` is that of
        this call alone. The server keeps the result for a while.
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
        """What happens to a generation of this caller, from its acceptance on.

        Finished images come again, progress does not. Leaving the block leaves the generation
        alone. Raises, at the first event, ``UnknownRequest`` for an id the server does not know.
        """
        self._transport.check_open()
        return Stream(self._transport, self._calls.watch(request_id, timeout, metadata))

    def cancel(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """End a generation of this caller at its next step, whoever waits for it.

        False where it had ended before. Raises ``UnknownRequest`` for an id it does not know.
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
        """What a request would take now, in seconds and bytes, without drawing it."""
        request = as_request(prompt, options)
        return self._transport.run(self._calls.estimate(request, timeout, metadata))

    def models(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> list[Model]:
        """Every model that the server was told to hold, in its order."""
        return self._transport.run(self._calls.models(timeout, metadata))

    def model(
        self,
        id: str = "",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """The model ``id``, which may stay empty where the server holds a single one.

        Raises ``ModelNotFound`` for a name that the server does not hold.
        """
        return self._transport.run(self._calls.model(id, timeout, metadata))

    def status(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> ServerStatus:
        """How the server is doing: its state, queue, engines and memory."""
        return self._transport.run(self._calls.status(timeout, metadata))

    def wait_until_ready(
        self, timeout: float | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Return once the server is up and its model loaded and warmed up.

        Raises ``Unavailable`` after ``timeout`` seconds (unset, the client's).
        """
        self._transport.check_open()
        wait = Readiness(self.target, self._settings.deadline(timeout))
        sent = self._settings.metadata(metadata)
        while True:
            watch = self._transport.stubs.health.Watch(
                REQUEST, timeout=wait.left, metadata=sent, wait_for_ready=True
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
        """Cancel what still runs, on the server too, and disconnect; may be called again."""
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
