"""The client for asyncio."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc

from darkroom.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from darkroom_client._call import GenerateCall, replayed
from darkroom_client._channel import open_async_channel
from darkroom_client._connection import TLS, Keepalive, Retry
from darkroom_client._enums import ImageFormat, Scheduler
from darkroom_client._errors import DarkroomError
from darkroom_client._many import draw_many_async
from darkroom_client._model import Model
from darkroom_client._readiness import REQUEST, Readiness
from darkroom_client._replay import ReplayRecord
from darkroom_client._request import GenerationRequest
from darkroom_client._result import GenerationResult
from darkroom_client._rpc_errors import from_rpc_error
from darkroom_client._settings import (
    DEFAULT_KEEPALIVE,
    DEFAULT_MAX_REPLY_BYTES,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT,
    Settings,
)
from darkroom_client._wire.models import decode_model
from darkroom_client._wire.results import decode_response


class AsyncClient:
    """As ``Client``, for asyncio: the same arguments, verbs and errors.

    It belongs to the event loop of its first call, where the connection opens. Cancelling the
    task that awaits a call cancels the call, and the server stops drawing.
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
        self._stubs: _Stubs | None = None
        self._closed = False

    @property
    def target(self) -> str:
        """The address that this client talks to."""
        return self._settings.target

    async def generate(
        self,
        prompt: str,
        *,
        model: str = "",
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        image_count: int | None = None,
        scheduler: Scheduler | str | None = None,
        format: ImageFormat | str | None = None,
        quality: int | None = None,
        exact: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """As ``Client.generate``."""
        request = GenerationRequest(
            prompt=prompt,
            model=model,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            image_count=image_count,
            scheduler=scheduler,
            format=format,
            quality=quality,
            exact=exact,
            request_id=request_id,
        )
        return await self._generate(request, timeout, metadata)

    async def replay(
        self,
        record: ReplayRecord,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """As ``Client.replay``."""
        return await self._generate(replayed(record), timeout, metadata)

    async def generate_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        on_done: Callable[[int, GenerationResult | DarkroomError], None] | None = None,
    ) -> list[GenerationResult | DarkroomError]:
        """As ``Client.generate_many``."""

        async def draw(request: GenerationRequest) -> GenerationResult:
            return await self._generate(request, timeout, metadata)

        return await draw_many_async(draw, requests, concurrency, on_done)

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """As ``Client.models``."""
        stubs, limit = self._open(), self._settings.deadline(timeout)
        try:
            response = await stubs.models.ListModels(
                model_pb2.ListModelsRequest(), timeout=limit, metadata=self._settings.metadata()
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.target, timeout=limit) from error
        return [decode_model(model) for model in response.models]

    async def model(self, id: str = "", *, timeout: float | None = None) -> Model:
        """As ``Client.model``."""
        stubs, limit = self._open(), self._settings.deadline(timeout)
        try:
            response = await stubs.models.GetModel(
                model_pb2.GetModelRequest(model=id),
                timeout=limit,
                metadata=self._settings.metadata(),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.target, timeout=limit) from error
        return decode_model(response.model)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """As ``Client.wait_until_ready``."""
        stubs = self._open()
        wait = Readiness(self.target, self._settings.deadline(timeout))
        while True:
            watch = stubs.health.Watch(
                REQUEST, timeout=wait.left, metadata=self._settings.metadata(), wait_for_ready=True
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
        """Cancel what still runs and close the connection; may be called again."""
        self._closed = True
        if self._stubs is not None:
            await self._stubs.channel.close()

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

    async def _generate(
        self, request: GenerationRequest, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> GenerationResult:
        stubs = self._open()
        call = GenerateCall.prepare(self._settings, request, timeout, metadata)
        try:
            response = await stubs.generation.Generate(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
        except grpc.RpcError as error:
            raise call.failure(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: the channel was closed under the call.
            raise call.cancelled() from None
        return decode_response(response)

    def _open(self) -> "_Stubs":
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._stubs is None:
            self._stubs = _Stubs(self._settings)
        if self._stubs.loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each")
        return self._stubs


class _Stubs:
    """The channel and its stubs, which gRPC ties to the event loop that is running now."""

    def __init__(self, settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.channel = open_async_channel(settings)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
