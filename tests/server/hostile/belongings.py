"""What this process holds, server and callers together: the same before and after, or it leaks."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

MAX_GROWTH_BYTES = 32 << 20
"""What the allocators may keep of memory that was freed."""


@asynccontextmanager
async def nothing_is_left(max_growth: int = MAX_GROWTH_BYTES) -> AsyncIterator[None]:
    """Tasks and descriptors must be back to what they were, soon after the block; memory nearly.

    The block must drop its calls: a call that is referred to keeps its connection open.
    """
    process = psutil.Process()
    gc.collect()
    tasks, files, rss = len(asyncio.all_tasks()), process.num_fds(), process.memory_info().rss
    yield
    async with asyncio.timeout(20):
        # gRPC closes connections on threads of its own.
        while len(asyncio.all_tasks()) > tasks or process.num_fds() > files:
            await asyncio.sleep(0.01)
            gc.collect()
    gc.collect()
    growth = process.memory_info().rss - rss
    assert growth < max_growth, f"memory grew by {growth >> 20} MiB"
