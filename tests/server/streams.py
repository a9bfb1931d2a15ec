"""Calls of the real wire that several tests make, and what their streams answer."""

from typing import Any

import grpc

from darkroom.v1 import generation_pb2
from tests.server.wire import Wire


def watch(wire: Wire, request_id: str) -> Any:
    return wire.generation.WatchGeneration(
        generation_pb2.WatchGenerationRequest(request_id=request_id)
    )


async def submit(wire: Wire, prompt: str = "a star", **fields: Any) -> Any:
    time_limit = fields.pop("time_limit", None)
    request = generation_pb2.SubmitGenerationRequest(
        generation=generation_pb2.GenerateRequest(prompt=prompt, **fields)
    )
    if time_limit is not None:
        request.time_limit.FromMilliseconds(round(time_limit * 1000))
    return (await wire.generation.SubmitGeneration(request)).accepted


def kind(response: Any) -> str:
    """The name of the event in ``response``."""
    name: str = response.event.WhichOneof("event")
    return name


async def read(call: Any, count: int = 1) -> list[Any]:
    """The next ``count`` events."""
    return [getattr(r.event, kind(r)) for r in [await call.read() for _ in range(count)]]


async def until(call: Any, name: str) -> Any:
    """The next event called ``name``."""
    while True:
        response = await call.read()
        assert response is not grpc.aio.EOF, f"the stream ended without {name}"
        if kind(response) == name:
            return getattr(response.event, name)


async def rest(call: Any) -> list[Any]:
    """The remaining responses."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def assembled(chunks: list[Any]) -> dict[int, bytes]:
    """The images that ``chunks`` make, by index; each must be complete and in one sequence."""
    images: dict[int, bytes] = {}
    current = -1
    for chunk in chunks:
        if chunk.offset == 0:
            assert chunk.image_index not in images
            assert chunk.image.format
            current = chunk.image_index
            images[current] = b""
        else:
            assert not chunk.HasField("image")
        assert chunk.image_index == current
        assert chunk.offset == len(images[current])
        assert len(chunk.data) <= 512 * 1024
        images[current] += chunk.data
        if len(images[current]) == chunk.size:
            current = -1
    assert current == -1
    return images
