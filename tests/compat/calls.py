"""Every call of the 0.1.0 SDK, with the imported version; `python calls.py ADDRESS`."""

import asyncio
import sys

import darkroom_client
from darkroom_client import (
    Accepted,
    AsyncClient,
    Client,
    Finished,
    ImageReady,
    Preview,
    Progress,
)

PROMPT = "a star"


def call_everything(client: Client) -> None:
    client.wait_until_ready(30)

    models = client.models()
    assert [model.id for model in models] == ["demo"]
    model = client.model()
    assert model == models[0]
    assert client.status().models[0].id == model.id

    estimate = client.estimate(PROMPT, steps=4)
    assert estimate is not None

    result = client.generate(PROMPT, steps=4, seed=7, image_count=2, width=64, height=64)
    assert [image.seed for image in result.images] == [7, 8]
    assert {(image.width, image.height) for image in result.images} == {(64, 64)}
    assert result.images[0].replay is not None
    again = client.replay(result.images[0].replay)
    assert again.images[0].data == result.images[0].data

    with client.stream(PROMPT, steps=4, preview_every=2) as stream:
        kinds = [type(event) for event in stream]
    assert kinds[0] is Accepted
    assert kinds[-1] is Finished
    assert {Progress, Preview, ImageReady} <= set(kinds)

    accepted = client.submit(PROMPT, steps=4)
    with client.watch(accepted.request_id) as watched:
        assert len(watched.result().images) == 1

    running = client.submit(PROMPT, steps=1000)
    assert client.cancel(running.request_id)


async def call_asynchronously(address: str) -> None:
    async with AsyncClient(address, insecure=True) as client:
        result = await client.generate(PROMPT, steps=4)
        assert len(result.images) == 1


if __name__ == "__main__":
    with Client(sys.argv[1], insecure=True) as client:
        call_everything(client)
    print(darkroom_client.__file__)
    asyncio.run(call_asynchronously(sys.argv[1]))
