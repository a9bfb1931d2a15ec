"""However a client process ends, the server runs none of its jobs after the grace time."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Results
from tests.server.wire import Wire, serving

SECONDS = 60.0
SHORT = Results(reattach_grace=0.2)
LONG = Results(reattach_grace=3600.0)

LEFT_ALONE = re.compile(r"ev_epoll1_linux\.cc.* file descriptor was created pre fork$")
"""What C-core may log in a forked child: it does not touch the connection of its parent."""

STREAM = """
stream = client.stream("a star", steps=4, request_id="r-1").__enter__()
next(stream)
"""
GENERATE = """
def generate():
    with contextlib.suppress(Cancelled):
        client.generate("a star", steps=4, request_id="r-1")
threading.Thread(target=generate, daemon=True).start()
"""
MANY = """
answers = client.generate_as_completed(
    [GenerationRequest(prompt="a star", steps=4, request_id="r-1")]
)
threading.Thread(target=next, args=(answers,), daemon=True).start()
"""
ASYNC = """
async def main():
    stream = AsyncClient(sys.argv[1]).stream("a star", steps=4, request_id="r-1")
    await stream.__aenter__()
    await anext(stream)
    await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""
jobs = pytest.mark.parametrize(
    "begin", [STREAM, GENERATE, MANY, ASYNC], ids=["stream", "generate", "many", "async"]
)

HEAD = """
import asyncio, contextlib, os, sys, threading
from darkroom_client import AsyncClient, Cancelled, Client, GenerationRequest
client = Client(sys.argv[1])
"""
WAIT = "\nsys.stdin.readline()\n"


class Program:
    """A client in its own process; it waits for ``go`` at each place that reads a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def go(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"go\n")

    async def line(self) -> str:
        assert self._process.stdout
        return (await self._process.stdout.readline()).decode().strip()

    async def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def exits(self) -> None:
        """Wait for the end, which must be a clean one."""
        _, errors = await self._process.communicate()
        lines = [line for line in errors.decode().splitlines() if not LEFT_ALONE.search(line)]
        assert (self._process.returncode, lines) == (0, [])


@asynccontextmanager
async def program(code: str, wire: Wire) -> AsyncIterator[Program]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HEAD + code,
        wire.server.address,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_VERBOSITY": "ERROR"},
    )
    try:
        async with asyncio.timeout(SECONDS):
            yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def accepted(wire: Wire) -> str:
    """The id of the job that the engine got."""
    job = await asyncio.wait_for(wire.submitted.get(), SECONDS)
    return job.id


async def ends(wire: Wire, job_id: str) -> None:
    """Wait until the server has cancelled the job and runs no job."""
    assert await asyncio.wait_for(wire.cancelled.get(), SECONDS) == job_id
    wire.engine.advance(1)
    dispatcher = wire.server.dispatcher
    await wire.becomes(lambda: not dispatcher.counts.live and not dispatcher.running_jobs)
    assert wire.engine.jobs == []


async def goes_on(wire: Wire, job_id: str) -> None:
    """Check that the server runs the job to its end without any subscription."""
    await wire.subscribers("r-1", 0)
    assert wire.cancelled.empty()
    assert [job.id for job in wire.engine.jobs] == [job_id]
    wire.engine.advance(4)
    await wire.counted(JobOutcome.FINISHED)


BLOCKS = """
with client, client.stream("a star", request_id="r-1") as stream:
    next(stream)
"""
CLOSE = STREAM + "client.close()\n"
CLOSE_OTHER_THREAD = GENERATE + WAIT + "client.close()\n"
ASYNC_BLOCKS = """
async def main():
    async with AsyncClient(sys.argv[1]) as client, client.stream("a star") as stream:
        await anext(stream)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "code",
    [BLOCKS, CLOSE, CLOSE_OTHER_THREAD, ASYNC_BLOCKS],
    ids=["blocks", "close", "thread", "async"],
)
async def test_a_client_that_is_closed_cancels_its_job_at_once(code: str) -> None:
    # The grace time is long: only the client's cancel call ends the job.
    async with serving(results=LONG) as wire, program(code, wire) as client:
        job = await accepted(wire)
        client.go()
        await ends(wire, job)
        await client.exits()


@jobs
async def test_after_an_exit_without_close_the_job_ends_within_the_grace_time(begin: str) -> None:
    async with serving(results=SHORT) as wire, program(begin + WAIT, wire) as client:
        job = await accepted(wire)
        client.go()
        client.go()
        await client.exits()
        await ends(wire, job)


async def test_a_batch_that_is_alive_at_the_exit_does_not_block_it() -> None:
    """Its finalizer runs when no thread can start any more, so it makes no cancel call."""
    code = """
requests = [GenerationRequest(prompt="a star", steps=steps) for steps in (1, 50)]
answers = client.generate_as_completed(requests)
next(answers)
"""
    async with serving(results=SHORT) as wire, program(code, wire) as client:
        for _ in range(2):
            await accepted(wire)
        (long,) = (job.id for job in wire.engine.jobs if job.steps == 50)  # They race.
        wire.engine.advance(1)
        await client.exits()
        await ends(wire, long)


@jobs
async def test_after_a_kill_the_job_ends_within_the_grace_time(begin: str) -> None:
    async with serving(results=SHORT) as wire, program(begin + WAIT, wire) as client:
        job = await accepted(wire)
        await client.kill()
        await ends(wire, job)


@jobs
async def test_after_a_kill_a_long_grace_time_keeps_the_job(begin: str) -> None:
    """Negative control of the test above: there the grace time ends the job."""
    async with serving(results=LONG) as wire, program(begin + WAIT, wire) as client:
        job = await accepted(wire)
        await client.kill()
        await goes_on(wire, job)


PARENT_STREAMS = """
with client, client.stream("a star", steps=4, request_id="r-1") as stream:
    next(stream)
    child = os.fork()
    if child == 0:
        {child}
    os.waitpid(child, 0)
    print("child ended", flush=True)
    print(len(stream.result().images), "image", flush=True)
"""
PARENT_GENERATES = """
def generate():
    print(len(client.generate("a star", steps=4, request_id="r-1").images), "image", flush=True)
thread = threading.Thread(target=generate)
thread.start()
sys.stdin.readline()
child = os.fork()
if child == 0:
    {child}
os.waitpid(child, 0)
print("child ended", flush=True)
thread.join()
"""


@pytest.mark.parametrize("parent", [PARENT_STREAMS, PARENT_GENERATES], ids=["stream", "generate"])
@pytest.mark.parametrize(
    "child", ["os._exit(0)", "sys.exit(0)", "client.close(); os._exit(0)"], ids=str
)
async def test_a_forked_child_that_ends_leaves_the_job_to_its_parent(
    parent: str, child: str
) -> None:
    # No grace time: a connection that the child broke would end the job.
    none = Results(reattach_grace=0.0)
    async with serving(results=none) as wire, program(parent.format(child=child), wire) as client:
        await accepted(wire)
        client.go()
        assert await client.line() == "child ended"
        assert wire.cancelled.empty()
        wire.engine.advance(4)
        assert await client.line() == "1 image"
        await wire.counted(JobOutcome.FINISHED)
        assert wire.server.dispatcher.counts.by_end[JobOutcome.CANCELLED] == 0
        await client.exits()


async def test_after_a_fork_and_a_kill_the_job_ends_within_the_grace_time() -> None:
    code = PARENT_STREAMS.format(child="os._exit(0)")
    async with serving(results=SHORT) as wire, program(code, wire) as client:
        job = await accepted(wire)
        assert await client.line() == "child ended"
        await client.kill()
        await ends(wire, job)
