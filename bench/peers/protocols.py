"""Clients of the peers: gRPC, HTTP and Triton's form of HTTP."""

import asyncio
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, Protocol

import grpc
import grpc.aio
import httpx2

from bench.peers.servers.config import to_wire
from bench.workload.arrivals import Outcome
from bench.workload.requests import Request
from darkroom.v1 import generation_pb2, generation_pb2_grpc, types_pb2

OPTIONS = (("grpc.max_receive_message_length", 64 * 2**20),)


class Ended(Exception):
    """A request ended without an image, with ``outcome``."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Wire(StrEnum):
    """The protocol of a peer."""

    GRPC = "grpc"
    LITSERVE = "litserve"
    RAY = "ray"
    TRITON = "triton"


class PeerClient(Protocol):
    """A client of one peer, on one event loop."""

    async def generate(self, request: Request, name: str, seconds: float | None) -> list[bytes]:
        """The PNG files of ``request``, whose id begins with ``name``.

        ``seconds`` remain until the deadline, None without one. Cancelling the awaiting task
        cancels the request. Raises ``Ended`` if an image does not come.
        """

    async def close(self) -> None:
        """Close the connections."""


class GrpcPeerClient:
    """Darkroom's gRPC service, which the usual gRPC server implements too."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def generate(self, request: Request, name: str, seconds: float | None) -> list[bytes]:
        """See ``PeerClient``."""
        try:
            response = await self._stub.Generate(_message(request, name), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise _ended(error) from error
        return [image.data for image in response.images]

    async def first_progress(self, request: Request, name: str) -> float:
        """Seconds until progress is first reported; waits for the images."""
        began = time.monotonic()
        first = None
        wanted = generation_pb2.GenerateStreamRequest(generation=_message(request, name))
        try:
            async for response in self._stub.GenerateStream(wanted):
                if first is None and response.event.WhichOneof("event") == "progress":
                    first = time.monotonic() - began
        except grpc.aio.AioRpcError as error:
            raise _ended(error) from error
        if first is None:
            raise Ended(Outcome.FAILED, "a stream ended without progress")
        return first

    async def close(self) -> None:
        """See ``PeerClient``."""
        await self._channel.close()


class HttpPeerClient:
    """Sends JSON, receives a PNG file of one image."""

    def __init__(self, url: str) -> None:
        self._url = url
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)

    async def generate(self, request: Request, name: str, seconds: float | None) -> list[bytes]:
        """See ``PeerClient``. HTTP has no deadlines: the caller cancels at its deadline.

        Several images are as many requests at once, so that they fill batches.
        """
        return await self.post_all([to_wire(each) for each in single_images(request)])

    async def post_all(
        self, bodies: Sequence[Mapping[str, Any]], headers: Mapping[str, str] | None = None
    ) -> list[bytes]:
        """The files of all answers, in order; raises ``Ended`` for the first one that fails."""
        try:
            async with asyncio.TaskGroup() as group:
                posts = [group.create_task(self.post(each, headers)) for each in bodies]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return [file for post in posts for file in post.result()]

    async def post(
        self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> list[bytes]:
        """The files of one answer. Raises ``Ended`` if it is none."""
        return self._files(await self.answer(self._url, body, headers))

    async def close(self) -> None:
        """See ``PeerClient``."""
        await self._client.aclose()

    async def answer(
        self, url: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        """The answer to a POST. Raises ``Ended`` if its status is not 200."""
        try:
            response = await self._client.post(url, json=body, headers=headers)
        except httpx2.TransportError as error:
            raise Ended(Outcome.FAILED, repr(error)) from error
        if response.status_code == 200:
            return response
        raise Ended(self._outcome(response), f"{response.status_code}: {response.text[:300]}")

    def _files(self, response: httpx2.Response) -> list[bytes]:
        return [response.content]

    def _outcome(self, response: httpx2.Response) -> Outcome:
        return Outcome.REJECTED if response.status_code in (429, 503) else Outcome.FAILED


class TritonPeerClient(HttpPeerClient):
    """The KServe protocol, version 2, with images in its binary extension."""

    def __init__(self, port: int, model: str = "demo") -> None:
        super().__init__(f"http://127.0.0.1:{port}/v2/models/{model}/infer")

    async def generate(self, request: Request, name: str, seconds: float | None) -> list[bytes]:
        """See ``PeerClient``. Triton rejects a request that waits past its deadline.

        Several images are the rows of one request, which count in Triton's batches.
        """
        body = infer_body([to_wire(each) for each in single_images(request)])
        if seconds is not None:
            body["parameters"] = {"timeout": round(max(0.001, seconds) * 1e6)}
        return await self.post(body)

    def _files(self, response: httpx2.Response) -> list[bytes]:
        tensor = response.content[int(response.headers["Inference-Header-Content-Length"]) :]
        return bytes_elements(tensor)

    def _outcome(self, response: httpx2.Response) -> Outcome:
        timeout = "timeout" in response.text.lower()
        return Outcome.EXPIRED if timeout else super()._outcome(response)


CLIENTS: dict[Wire, Callable[[int], PeerClient]] = {
    Wire.GRPC: GrpcPeerClient,
    Wire.LITSERVE: lambda port: HttpPeerClient(f"http://127.0.0.1:{port}/predict"),
    Wire.RAY: lambda port: HttpPeerClient(f"http://127.0.0.1:{port}/"),
    Wire.TRITON: TritonPeerClient,
}


def single_images(request: Request) -> list[Request]:
    """``request`` as requests for one image each."""
    return [replace(request, seed=request.seed + i, images=1) for i in range(request.images)]


def infer_body(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of a request to Triton with ``rows``, one for each image."""
    data = [json.dumps(each) for each in rows]
    shape = [len(data), 1]
    return {
        "inputs": [{"name": "request", "shape": shape, "datatype": "BYTES", "data": data}],
        "outputs": [{"name": "image", "parameters": {"binary_data": True}}],
    }


def bytes_elements(tensor: bytes) -> list[bytes]:
    """The elements of a BYTES tensor: four bytes of length, little endian, come before each."""
    found, place = [], 0
    while place < len(tensor):
        (length,) = struct.unpack_from("<I", tensor, place)
        place += 4 + length
        found.append(tensor[place - length : place])
    return found


def _message(request: Request, name: str) -> generation_pb2.GenerateRequest:
    fields = {key: value for key, value in to_wire(request).items() if key != "index"}
    return generation_pb2.GenerateRequest(
        request_id=f"{name}-{request.index}",
        image_count=request.images,
        format=types_pb2.IMAGE_FORMAT_PNG,
        **fields,
    )


def _ended(error: grpc.aio.AioRpcError) -> Ended:
    outcomes = {
        grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.EXPIRED,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.REJECTED,
        grpc.StatusCode.UNAVAILABLE: Outcome.REJECTED,
    }
    return Ended(outcomes.get(error.code(), Outcome.FAILED), f"{error.code()}: {error.details()}")
