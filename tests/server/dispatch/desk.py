"""A dispatcher with the fake engine, and no wire."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.dispatch import Dispatcher


async def settle() -> None:
    """Let the loop handle what the engine told."""
    for _ in range(3):
        await asyncio.sleep(0)


@asynccontextmanager
async def dispatching(
    engine: FakeEngine | None = None, *, ready: bool = True, **options: Any
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    engine = engine or FakeEngine(load=ready)
    limits = {"max_queued_jobs": 4, "max_resident_samples": 2, **options}
    dispatcher = Dispatcher([engine], [model.id for model in engine.models], **limits)
    dispatcher.start()
    if ready:
        await dispatcher.loaded()
    yield dispatcher, engine
    await dispatcher.close()
    assert dispatcher.counts.live == 0
