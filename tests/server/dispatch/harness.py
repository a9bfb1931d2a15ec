"""A dispatcher with the fake engine, without gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.dispatch import Dispatcher

SPEED = ModelSpeed(passes=((2, 1.0), (4, 1.5), (8, 2.5)), decode=0.5)


def timed_engine() -> FakeEngine:
    """An engine whose measured batches take 1 to 2.5 s and have 8 rows at most."""
    return FakeEngine([replace(fake_model(), speed=SPEED)])


async def settle() -> None:
    """Run the event loop until it has handled the engine's events."""
    for _ in range(3):
        await asyncio.sleep(0)


@asynccontextmanager
async def dispatching(
    engine: FakeEngine | None = None, *, ready: bool = True, **options: Any
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """A started dispatcher and its engine; ``options`` are arguments of ``Dispatcher``.

    At the end no job may remain.
    """
    engine = engine or FakeEngine(load=ready)
    limits = {"max_queued_jobs": 4, "max_resident_samples": 2, **options}
    dispatcher = Dispatcher([engine], [model.id for model in engine.models], **limits)
    dispatcher.start()
    if ready:
        await dispatcher.loaded()
    yield dispatcher, engine
    await dispatcher.close()
    assert dispatcher.counts.live == 0
