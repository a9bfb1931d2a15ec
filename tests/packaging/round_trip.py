"""A program for an environment of its own: the installed client against a server of stubs.

Prints the versions of grpcio and protobuf that it ran with.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from darkroom_client import AsyncClient, Client

PIXELS = b"not really an image"


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        image = generation_pb2.Image(
            data=PIXELS,
            format=types_pb2.IMAGE_FORMAT_PNG,
            width=64,
            height=64,
            seed=request.seed,
            replay=generation_pb2.ReplayRecord(request=request),
        )
        return generation_pb2.GenerateResponse(request_id=request.request_id, images=[image])


async def generate_async(target: str) -> bytes:
    async with AsyncClient(target) as client:
        result = await client.generate("a small red circle", seed=0)
        return result.images[0].data


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(), server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with Client(target) as client:
            image = client.generate("a small red circle", seed=7).images[0]
        assert (image.data, image.seed) == (PIXELS, 7)
        assert asyncio.run(generate_async(target)) == PIXELS
    finally:
        server.stop(None).wait()
    print(version("grpcio"), version("protobuf"))


if __name__ == "__main__":
    main()
