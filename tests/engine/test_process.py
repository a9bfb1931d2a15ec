"""Real faults of the engine's process: killed, stopped, orphaned."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import structlog

from darkroom_server.backends import load_limit, process
from darkroom_server.backends.load_limit import LoadLimit
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.events import (
    BatchDone,
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobStarted,
    MemoryReport,
)

from .conftest import config_for, make_job
from .engine_process import FAKE_LOOP, child_with
from .test_contract import Listener


@pytest.fixture
def fake_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CHILD", FAKE_LOOP)


def started(folder: Path, timeout: float = 60.0) -> tuple[ProcessEngine, Listener, int]:
    engine = ProcessEngine(config_for(folder), timeout=timeout)
    listener = Listener(engine)
    listener.until(lambda e: isinstance(e, EngineReady))
    assert engine.pid is not None
    return engine, listener, engine.pid


def open_files() -> int:
    """Open descriptors, once the threads of every engine's process have ended."""
    for thread in threading.enumerate():
        if thread.name == "engine-process":
            thread.join(20)
    return psutil.Process().num_fds()


@pytest.mark.usefixtures("fake_loop")
def test_a_killed_process_is_reported_and_can_be_started_again(tiny_folder: Path) -> None:
    files = open_files()
    engine, listener, pid = started(tiny_folder)
    job = make_job("before", exact=True)
    engine.submit(job)
    listener.until_end_of("before")
    engine.submit(make_job("lost", steps=150))
    listener.until(lambda e: isinstance(e, JobStarted) and e.job_id == "lost")
    os.kill(pid, signal.SIGKILL)
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert died == EngineDied("the engine's process died")
    engine.start(listener.events.put)
    listener.until(lambda e: isinstance(e, EngineReady))
    assert engine.pid != pid
    engine.submit(make_job("after", exact=True))
    listener.until_end_of("after")
    before, after = (listener.of(id, ImageReady)[0].image for id in ("before", "after"))
    assert before.data == after.data
    engine.close()
    assert open_files() == files


@pytest.mark.parametrize("set_to", [None, "backend:native"])
def test_its_allocator_makes_segments_that_grow_unless_the_environment_says_otherwise(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, set_to: str | None
) -> None:
    for name in process.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if set_to:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", set_to)
    monkeypatch.setattr(process, "CHILD", FAKE_LOOP)
    engine, _, pid = started(tiny_folder)
    environment = psutil.Process(pid).environ()
    engine.close()
    allocator = None if set_to else "expandable_segments:True"
    assert environment.get("PYTORCH_CUDA_ALLOC_CONF") == allocator
    assert environment["PATH"] == os.environ["PATH"]


HANGING = """
import sys
from darkroom_server.core.events import EngineReady, MemoryReport
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
channel.send(EngineReady((), 0.0))
while channel.receive():
    channel.send(MemoryReport(device="cpu", by_kind={}, host_rss=1))
"""


def test_memory_reports_do_not_reset_the_timeout(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", ("-c", HANGING))
    engine, listener, _ = started(tiny_folder, timeout=0.5)
    engine.submit(make_job("stuck"))
    while isinstance(
        event := listener.until(lambda e: isinstance(e, MemoryReport | EngineDied)), MemoryReport
    ):
        engine.cancel("nobody")  # Each command makes the process emit again.
    assert event == EngineDied("the engine was silent for 0.5 s, and was killed")
    engine.close()


@pytest.mark.usefixtures("fake_loop")
def test_a_process_that_hangs_at_work_is_killed(tiny_folder: Path) -> None:
    engine, listener, pid = started(tiny_folder, timeout=0.5)
    engine.submit(make_job("stuck", steps=150))
    listener.until(lambda e: isinstance(e, JobStarted))
    os.kill(pid, signal.SIGSTOP)
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert isinstance(died, EngineDied)
    assert "silent for 0.5 s" in died.message
    assert not psutil.pid_exists(pid)
    engine.close()


LOADING_ONCE = """
import os, sys, time
from darkroom_server.core.events import EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
if os.path.exists({flag!r}):
    time.sleep(600)
open({flag!r}, "w").close()
channel.send(EngineReady((), 0.0))
channel.receive()
"""


def test_a_process_that_hangs_while_it_loads_again_is_killed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "loaded"
    monkeypatch.setattr(process, "CHILD", ("-c", LOADING_ONCE.format(flag=str(flag))))
    monkeypatch.setattr(load_limit, "SHORTEST_LOAD_SECONDS", 3.0)
    engine = ProcessEngine(config_for(tiny_folder), load_timeout=600.0)
    listener = Listener(engine)
    listener.until(lambda e: isinstance(e, EngineReady))
    learned = engine._load_limit.seconds
    assert 3.0 <= learned < 600.0
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    listener.until(lambda e: isinstance(e, EngineDied))
    engine.start(listener.events.put)
    pid = engine.pid
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert died == EngineDied(f"the engine had not loaded after {learned:.3g} s, and was killed")
    assert not psutil.pid_exists(pid)
    assert engine._load_limit.seconds == 2 * learned
    flag.unlink()
    engine.start(listener.events.put)
    listener.until(lambda e: isinstance(e, EngineReady))
    engine.close()


def test_the_first_load_has_a_limit_too(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CHILD", ("-c", "import time; time.sleep(600)"))
    engine = ProcessEngine(config_for(tiny_folder), load_timeout=0.5)
    died = Listener(engine).until(lambda e: isinstance(e, EngineDied))
    assert died == EngineDied("the engine had not loaded after 0.5 s, and was killed")
    engine.close()


def test_the_limit_of_a_load_is_learned_and_never_above_the_setting() -> None:
    limit = LoadLimit(100.0)
    assert limit.seconds == 100.0
    limit.loaded(1.0)
    assert limit.seconds == 60.0
    limit.loaded(20.0)
    assert limit.seconds == 80.0
    limit.timed_out()
    assert limit.seconds == 100.0


HALF_A_MESSAGE = """
import os, struct, sys, time
from darkroom_server.core.events import EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
channel.send(EngineReady((), 0.0))
channel.receive()
os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"half")
time.sleep(600)
"""


def test_a_process_that_hangs_in_the_middle_of_a_message_is_killed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", ("-c", HALF_A_MESSAGE))
    engine, listener, pid = started(tiny_folder, timeout=0.5)
    engine.submit(make_job("stuck"))
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert died == EngineDied("the engine was silent for 0.5 s, and was killed")
    assert not psutil.pid_exists(pid)
    engine.close()


@pytest.mark.usefixtures("fake_loop")
def test_a_stopped_process_does_not_block_its_callers(tiny_folder: Path) -> None:
    engine, listener, pid = started(tiny_folder)
    os.kill(pid, signal.SIGSTOP)
    for i in range(300):  # More than the pipe holds.
        engine.submit(make_job(f"heap-{i}", prompt="x" * 8000, steps=1))
        engine.cancel(f"heap-{i}")
    os.kill(pid, signal.SIGCONT)
    listener.until_end_of(*(f"heap-{i}" for i in range(300)))
    engine.close()


FAILING = """
def start_loop(*_):
    raise OSError("the device's file is gone")
"""

DYING = """
def start_loop(_, emit):
    class Loop:
        def run(self):
            for rows in range(1, 6):
                emit(BatchDone(model="tiny", width=64, height=64, rows=rows, seconds=0.001))
            raise OSError("the device is gone")

    return Loop(), EngineReady((), 0.0)
"""


def test_an_os_error_is_not_taken_for_a_closed_channel(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", child_with(FAILING))
    engine = ProcessEngine(config_for(tiny_folder))
    with structlog.testing.capture_logs() as lines:
        listener = Listener(engine)
        died = listener.until(lambda e: isinstance(e, EngineDied))
        engine.close()  # And with it the thread that reads the log.
    assert died == EngineDied("the engine died; the log above says why")
    exceptions = [line["exception"] for line in lines if "exception" in line]
    assert [text.splitlines()[-1] for text in exceptions] == ["OSError: the device's file is gone"]


def test_events_before_an_engine_died_are_emitted(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", child_with(DYING))
    engine = ProcessEngine(config_for(tiny_folder))
    rows: list[int] = []

    def died(event: Event) -> bool:
        if isinstance(event, BatchDone):
            rows.append(event.rows)
        return isinstance(event, EngineDied)

    Listener(engine).until(died)
    assert rows == [1, 2, 3, 4, 5]
    engine.close()


GARBLING = """
import sys, time
from darkroom_server.core.events import EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
channel.send(EngineReady((), 0.0))
channel._connection.send_bytes(b"no pickle")
time.sleep(600)
"""


def test_a_process_that_cannot_be_understood_is_killed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", ("-c", GARBLING))
    engine, listener, pid = started(tiny_folder)
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert died == EngineDied("the engine's process died")
    assert not psutil.pid_exists(pid)
    engine.close()


class Unreadable:
    """Can be sent, and not received."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


@pytest.mark.usefixtures("fake_loop")
def test_a_process_that_cannot_understand_ends(tiny_folder: Path) -> None:
    engine, listener, _ = started(tiny_folder)
    assert engine._process is not None
    with structlog.testing.capture_logs() as lines:
        engine._process.send(Unreadable())
        died = listener.until(lambda e: isinstance(e, EngineDied), timeout=60)
        engine.close()
    assert died == EngineDied("the engine's process died")
    assert "message from the server cannot be read" in [line["event"] for line in lines]


@pytest.mark.parametrize("spare", range(4))
def test_without_a_thread_to_spare_nothing_is_left_behind(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    files, children = open_files(), psutil.Process().children()
    left = [True] * spare

    class Scarce(threading.Thread):
        def start(self) -> None:
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
            super().start()

    monkeypatch.setattr(process, "CHILD", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(threading, "Thread", Scarce)
    emitted: list[Event] = []
    engine = ProcessEngine(config_for(tiny_folder))
    with pytest.raises(RuntimeError, match="new thread"):
        engine.start(emitted.append)
    monkeypatch.undo()
    assert engine.pid is None
    assert not emitted
    assert psutil.Process().children() == children
    assert open_files() == files


PARENT = """
import sys, time
import structlog
from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, ModelSource
from darkroom_server.core.events import EngineReady
from darkroom_server.backends import process
from darkroom_server.backends.process import ProcessEngine

engine = ProcessEngine(EngineConfig(
    models=(ModelSource(id="tiny", location=sys.argv[1]),), device="cpu", dtype=Dtype.FLOAT32,
    attention=Attention.SDPA, rows=2,
))
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
engine.start(lambda e: print(engine.pid, flush=True) if isinstance(e, EngineReady) else None)
assert "torch" not in sys.modules
maps = open("/proc/self/maps").read()
assert "libtorch" not in maps
time.sleep(600)
"""


def test_the_parents_death_ends_the_process(tiny_folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_folder)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            child = psutil.Process(int(parent.stdout.readline()))
        finally:
            parent.kill()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_a_process_that_still_loads_is_not_waited_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(process, "CLOSE_SECONDS", 500.0)
    engine = ProcessEngine(config_for(tiny_folder))
    Listener(engine)
    pid = engine.pid
    assert pid is not None
    engine.close()
    assert not psutil.pid_exists(pid)


SILENT = """
import os, sys, time
from darkroom_server.core.events import EngineReady
from darkroom_server.ipc.channel import Channel

channel = Channel(int(sys.argv[1]))
channel.receive()
channel.send(EngineReady((), 0.0))
channel.close()
time.sleep(600)
"""


def test_a_process_that_does_not_end_is_reported(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for the driver of a lost GPU: being killed changes nothing."""
    monkeypatch.setattr(process, "CHILD", ("-c", SILENT))
    monkeypatch.setattr(process, "REAP_SECONDS", 0.1)
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.1)
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        spared: list[subprocess.Popen[bytes]] = []
        patch.setattr(subprocess.Popen, "kill", lambda process: spared.append(process))
        engine, listener, pid = started(tiny_folder)
        died = listener.until(lambda e: isinstance(e, EngineDied), timeout=20)
        engine.close()
        assert psutil.pid_exists(pid)
    os.kill(pid, signal.SIGKILL)
    assert spared[0].wait(20) == -signal.SIGKILL  # And no process is left for a later test.
    assert died == EngineDied("the engine's process died; its process does not end")
    assert [line["pid"] for line in lines if "does not end" in line["event"]] == [pid, pid]
