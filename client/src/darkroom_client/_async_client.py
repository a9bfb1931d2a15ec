"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, Unpack

import grpc

from darkroom_client import _batch
from darkroom_client._async_stream import AsyncStream
from darkroom_client._errors import DarkroomError
from darkroom_client._model_methods import AsyncModelMethods
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
from darkroom_client._transport.aio import AsyncTransport
from darkroom_client._types.connection import TLS, Keepalive, Retry
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.events import Accepted
from darkroom_client._types.inputs import ImageSource
from darkroom_client._types.job import Job
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.request import GenerationOptions, GenerationRequest, as_request
from darkroom_client._types.result import GenerationResult
from darkroom_client._types.status import Estimate, ServerStatus


class AsyncClient(AsyncModelMethods):
    """Like ``Client``, for asyncio: the same arguments, methods and errors.

    It belongs to the event loop of its first call, where the connection opens. Cancelling the
    task that awaits a call cancels the call and its job.
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
        self._transport = AsyncTransport(self._settings)

    @property
    def target(self) -> str:
        """The address of the server."""
        return self._settings.target

    async def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Like ``Client.generate``."""
        request = as_request(prompt, options)
        return await self._transport.run(self._calls.generate(request, timeout, metadata))

    def stream(
        self,
        prompt: str | GenerationRequest,
        *,
        preview_every: int = 0,
        preview_format: ImageFormat | str = ImageFormat.JPEG,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream:
        """Like ``Client.stream``."""
        self._transport.check_open()
        request = as_request(prompt, options)
        session = self._calls.stream(request, preview_every, preview_format, timeout, metadata)
        return AsyncStream(self._transport, session)

    async def replay(
        self,
        record: ReplayRecord,
        *,
        images: Iterable[ImageSource] = (),
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Like ``Client.replay``."""
        request = replayed(record, images)
        return await self._transport.run(self._calls.generate(request, timeout, metadata))

    async def generate_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult | DarkroomError]:
        """Like ``Client.generate_many``."""
        answers = self._generate_many(
            _batch.with_options(requests, options), concurrency, timeout, metadata
        )
        async with aclosing(answers):
            return _batch.in_order([answer async for answer in answers])

    def generate_as_completed(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncIterator[tuple[int, GenerationResult | DarkroomError]]:
        """Like ``Client.generate_as_completed``."""
        self._transport.check_open()
        return self._generate_many(
            _batch.with_options(requests, options), concurrency, timeout, metadata
        )

    async def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        time_limit: float | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Accepted:
        """Like ``Client.submit``."""
        request = as_request(prompt, options)
        return await self._transport.run(self._calls.submit(request, time_limit, timeout, metadata))

    def watch(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncStream:
        """Like ``Client.watch``."""
        self._transport.check_open()
        return AsyncStream(self._transport, self._calls.watch(request_id, timeout, metadata))

    async def result(
        self,
        request_id: str,
        timeout: float | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Like ``Client.result``."""
        return await self.watch(request_id, timeout=timeout, metadata=metadata).result()

    async def job(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Like ``Client.job``."""
        return await self._transport.run(self._calls.job(request_id, timeout, metadata))

    async def jobs(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> AsyncIterator[Job]:
        """Like ``Client.jobs``, for ``async for``."""
        token, more = "", True
        while more:
            page = await self._transport.run(self._calls.jobs(token, timeout, metadata))
            for job in page.jobs:
                yield job
            token = page.next_token
            more = bool(token)

    async def cancel(
        self,
        request_id: str,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Like ``Client.cancel``."""
        return await self._transport.run(self._calls.cancel(request_id, timeout, metadata))

    async def estimate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Estimate:
        """Like ``Client.estimate``."""
        request = as_request(prompt, options)
        return await self._transport.run(self._calls.estimate(request, timeout, metadata))

    async def status(
        self, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> ServerStatus:
        """Like ``Client.status``."""
        return await self._transport.run(self._calls.status(timeout, metadata))

    async def wait_until_ready(
        self, timeout: float | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Like ``Client.wait_until_ready``."""
        self._transport.check_open()
        wait = Readiness(self.target, self._settings.deadline(timeout))
        sent = self._settings.metadata(metadata)
        while True:
            watch = self._transport.stubs.health.Watch(
                REQUEST, timeout=wait.remaining, metadata=sent, wait_for_ready=True
            )
            try:
                async for response in watch:
                    if wait.saw(response):
                        return
            except grpc.RpcError as error:
                wait.failed(error)
            finally:
                watch.cancel()
            wait.check()
            await asyncio.sleep(wait.pause)

    async def close(self) -> None:
        """Cancel every job in flight, also on the server, and disconnect. Idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.target!r})"

    def _generate_many(
        self,
        requests: Iterable[GenerationRequest],
        concurrency: int,
        timeout: float | None,
        metadata: Mapping[str, str] | None,
    ) -> AsyncGenerator[tuple[int, GenerationResult | DarkroomError], None]:
        async def run(call: _batch.PreparedCall) -> GenerationResult:
            if isinstance(call, DarkroomError):
                raise call
            return await self._transport.run(call)

        calls = _batch.prepare(
            lambda request: self._calls.generate(request, timeout, metadata),
            requests,
        )
        concurrency = _batch.check_concurrency(concurrency)
        pacer = BatchPacer(concurrency, self._settings.deadline(timeout), self._settings.retry)
        return _batch.run_paced(run, calls, pacer)
