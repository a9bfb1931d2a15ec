"""An engine dies in a server that has used up its file descriptors."""

import subprocess
import sys

SERVER = """
import asyncio, os, resource, signal, sys
from darkroom_server.backends import process
from darkroom_server.backends.descriptors import raise_descriptor_limit
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.dispatch import Dispatcher

process.CHILD = ("-c", '''
import sys
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
channel.send(EngineReady((fake_model(),), 0.0))
channel.receive()
''')
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
limit = raise_descriptor_limit()
assert 128 <= limit < 256, limit
taken = []

def use_up():
    try:
        while True:
            taken.append(os.dup(0))
    except OSError as error:
        assert error.errno == 24, error

async def kill(engine, dispatcher):
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    while dispatcher.ready:
        await asyncio.sleep(0.01)
    use_up()  # Also what the engine had.
    return pid

async def until_ready(engine, dispatcher, pid):
    async with asyncio.timeout(60):
        while not dispatcher.ready:
            assert not dispatcher.availability._failed.is_set(), dispatcher.availability._failure
            await asyncio.sleep(0.05)
    assert engine.pid != pid

async def main():
    engine = process.ProcessEngine(EngineConfig(models=(), device="cpu"))
    dispatcher = Dispatcher(
        [engine], ["demo"], max_queued_jobs=9, max_resident_samples=9, max_restarts=2
    )
    dispatcher.start()
    await dispatcher.loaded()
    use_up()
    await until_ready(engine, dispatcher, await kill(engine, dispatcher))
    print("restarted from the reserve", len(taken) > 100, flush=True)

    # Without a reserve nothing can start, until somebody closes a file.
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    await kill(engine, dispatcher)
    (handle,) = dispatcher._pool.engines
    async with asyncio.timeout(60):
        while handle.starts_without_resources < 4:
            await asyncio.sleep(0.05)
    while taken:
        os.close(taken.pop())
    await until_ready(engine, dispatcher, None)
    print("restarted once files were closed", len(handle.deaths), flush=True)
    await dispatcher.close()

asyncio.run(main())
"""


def test_an_engine_restarts_although_all_descriptors_are_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER], capture_output=True, text=True, timeout=240, check=False
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("restarted")]
    assert said == [
        "restarted from the reserve True",
        "restarted once files were closed 2",
    ], done.stdout + done.stderr
