"""The blocking client."""

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc

from darkroom.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from darkroom_client._call import GenerateCall, replayed
from darkroom_client._channel import open_channel
from darkroom_client._connection import TLS, Keepalive, Retry
from darkroom_client._enums import ImageFormat, Scheduler
from darkroom_client._errors import DarkroomError
from darkroom_client._many import Running, draw_many
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


class Client:
    """A connection to a Darkroom server; safe to share between threads.

    ``target``: host:port, or any gRPC target; unset, DARKROOM_TARGET, else 127.0.0.1:50051.
    ``token``: sent as a bearer token; unset, DARKROOM_TOKEN. A token is refused over plaintext
    unless ``insecure`` is true. ``tls``: unset, DARKROOM_CA names the file of ``TLS.ca``; with
    neither the connection is plaintext. ``timeout``: seconds that a call may take, retries
    included, 120 by default; None for no limit. ``max_reply_bytes``: the server refuses, before
    it draws, what would not fit into a reply of that size.

    The connection opens at the first call and comes back by itself when it breaks. Raises
    ``ValueError`` for settings that contradict each other.
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
        self._channel = open_channel(self._settings)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._closed = False

    @property
    def target(self) -> str:
        """The address that this client talks to."""
        return self._settings.target

    def generate(
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
        """Draw images of ``prompt`` and wait for them.

        What each argument means is said at ``GenerationRequest``; unset means the model's
        default. ``timeout``: seconds, retries included; unset, the client's. ``metadata``: sent
        along. Raises a ``DarkroomError``, whose tree says what to do about it.
        """
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
        return self._generate(request, timeout, metadata)

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
        return self._generate(replayed(record), timeout, metadata)

    def generate_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        on_done: Callable[[int, GenerationResult | DarkroomError], None] | None = None,
    ) -> list[GenerationResult | DarkroomError]:
        """Draw many requests, at most ``concurrency`` at a time, and wait for all.

        The answers come in the order of ``requests``, a string being a prompt; one that failed
        is its error, and costs the others nothing. ``timeout`` counts for each request.
        ``on_done`` is called with the index and the answer as each arrives.
        """

        def start(request: GenerationRequest) -> Running:
            call = GenerateCall.prepare(self._settings, request, timeout, metadata)
            future = self._generation.Generate.future(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
            return call, future

        self._check_open()
        return draw_many(start, requests, concurrency, on_done)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """Every model that the server was told to hold, in its order."""
        self._check_open()
        limit = self._settings.deadline(timeout)
        try:
            response = self._models.ListModels(
                model_pb2.ListModelsRequest(), timeout=limit, metadata=self._settings.metadata()
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.target, timeout=limit) from error
        return [decode_model(model) for model in response.models]

    def model(self, id: str = "", *, timeout: float | None = None) -> Model:
        """The model ``id``, which may stay empty where the server holds a single one.

        Raises ``ModelNotFound`` for a name that the server does not hold.
        """
        self._check_open()
        limit = self._settings.deadline(timeout)
        try:
            response = self._models.GetModel(
                model_pb2.GetModelRequest(model=id),
                timeout=limit,
                metadata=self._settings.metadata(),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.target, timeout=limit) from error
        return decode_model(response.model)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return once the server is up and its model loaded and warmed up.

        Raises ``Unavailable`` after ``timeout`` seconds (unset, the client's).
        """
        self._check_open()
        wait = Readiness(self.target, self._settings.deadline(timeout))
        while True:
            watch = self._health.Watch(
                REQUEST, timeout=wait.left, metadata=self._settings.metadata(), wait_for_ready=True
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
        """Cancel what still runs and close the connection; may be called again."""
        self._closed = True
        self._channel.close()

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

    def _generate(
        self, request: GenerationRequest, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> GenerationResult:
        self._check_open()
        call = GenerateCall.prepare(self._settings, request, timeout, metadata)
        try:
            response = self._generation.Generate(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
        except grpc.RpcError as error:
            raise call.failure(error) from error
        return decode_response(response)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")
