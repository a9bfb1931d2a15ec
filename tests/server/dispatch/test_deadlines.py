import asyncio
import time

from darkroom_server.dispatch.deadlines import Deadlines


async def test_deadlines_are_called_in_order_and_once() -> None:
    rung: asyncio.Queue[str] = asyncio.Queue()
    deadlines = Deadlines(rung.put_nowait)
    now = time.monotonic()
    deadlines.add("second", now + 0.02)
    deadlines.add("first", now + 0.01)
    deadlines.add("discarded", now + 0.005)
    deadlines.add("never", None)
    deadlines.discard("discarded")
    assert [await rung.get(), await rung.get()] == ["first", "second"]
    assert rung.empty()
    assert deadlines._timer is None


async def test_an_id_may_come_back_with_another_deadline() -> None:
    rung: asyncio.Queue[str] = asyncio.Queue()
    deadlines = Deadlines(rung.put_nowait)
    deadlines.add("a", time.monotonic() + 60)
    deadlines.discard("a")
    deadlines.add("a", time.monotonic())
    assert await rung.get() == "a"
    deadlines.add("b", time.monotonic() + 60)
    deadlines.close()
    assert deadlines._timer is None
