"""Runs in a separate environment: the installed client against its own fake server.

Prints the versions of grpcio and protobuf that it ran with.
"""

import asyncio
from importlib.metadata import version

from darkroom_client import AsyncClient, Client, ImageReady, Overloaded
from darkroom_client.testing import Behaviour, FakeServer


async def follow(target: str) -> int:
    async with AsyncClient(target) as client, client.stream("a circle", image_count=2) as stream:
        return len([event async for event in stream if isinstance(event, ImageReady)])


def main() -> None:
    with FakeServer() as server, Client(server.target) as client:
        client.wait_until_ready()
        image = client.generate("a small red circle", seed=7).images[0]
        assert (image.data[:4], image.seed) == (b"\x89PNG", 7)
        server.script(Behaviour(error=Overloaded("full", retry_after=1.5)))
        (answer,) = client.generate_many(["a small red circle"])
        assert isinstance(answer, Overloaded)
        assert answer.retry_after == 1.5
        assert asyncio.run(follow(server.target)) == 2
    print(version("grpcio"), version("protobuf"))


if __name__ == "__main__":
    main()
