"""Leak check: compares the tasks, descriptors and memory of this process before and after."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

MAX_GROWTH_BYTES = 32 << 20
"""Freed memory that the allocators may keep."""


@asynccontextmanager
async def nothing_leaks(max_growth: int = MAX_GROWTH_BYTES) -> AsyncIterator[None]:
    """Assert that tasks and descriptors return to their counts soon after the block.

    Memory may grow by ``max_growth`` bytes. The block must delete its references to calls: a
    referenced call keeps its connection open.
    """
    process = psutil.Process()
    gc.collect()
    tasks, files, rss = len(asyncio.all_tasks()), process.num_fds(), process.memory_info().rss
    yield
    async with asyncio.timeout(60):
        # gRPC closes connections on its own threads.
        while len(asyncio.all_tasks()) > tasks or process.num_fds() > files:
            await asyncio.sleep(0.01)
            gc.collect()
    gc.collect()
    growth = process.memory_info().rss - rss
    assert growth < max_growth, f"memory grew by {growth >> 20} MiB"
