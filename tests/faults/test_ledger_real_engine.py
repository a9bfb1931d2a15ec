"""An inpainting job of the demo model, whose server dies: the same bytes after a restart.

The death is a copy of the ledger's file, taken while the job runs: what a killed server leaves.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from darkroom_client import AsyncClient, Progress
from darkroom_server.app import Server
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.settings import Network, Settings, Shutdown, Storage
from darkroom_server.settings.sources import DEMO_MODEL
from tests.server.ledger.copies import left_behind
from tests.server.uploads.pictures import encoded, halves, mask

SIZE = (64, 64)
INPAINT: dict[str, Any] = {
    "prompt": "a yellow star",
    "image": encoded(halves(SIZE)),
    "mask_image": mask(SIZE),
    "strength": 0.9,
    "steps": 12,
    "seed": 7,
    "exact": True,
}


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[AsyncClient]:
    model = ModelSource(id="demo", location=str(DEMO_MODEL))
    engine = ThreadEngine(EngineConfig(models=(model,), device="cpu", threads=1, rows=4))
    settings = Settings(
        network=Network(port=0, metrics_port=0),
        storage=Storage(ledger=f"sqlite:{path}"),
        shutdown=Shutdown(grace=0.0),
    )
    server = Server(settings, [engine])
    await server.startup()
    serve = asyncio.create_task(server.serve())
    try:
        async with AsyncClient(server.address) as client:
            await client.wait_until_ready(120)
            yield client
    finally:
        server.stop()
        await serve
        await server.shutdown()


async def test_an_inpainting_job_finishes_after_the_death_of_its_server(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with serving(path) as client:
        await client.submit(request_id="mine", **INPAINT)
        async with client.watch("mine") as stream:
            async for event in stream:
                if isinstance(event, Progress):
                    break
        copy = left_behind(path)
    async with serving(copy) as client:
        image = (await client.result("mine", 60)).image
        fresh = (await client.generate(**INPAINT)).image
    assert image.seed == 7
    assert image.data == fresh.data
    assert image.replay.pixels_sha256 == fresh.replay.pixels_sha256
