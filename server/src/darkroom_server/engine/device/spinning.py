"""Lets the CPU's threads spin while they wait for each other, unless others want their cores.

A batch on a CPU is some thousand short parallel loops of OpenMP. A thread that is early at the end
of a loop can spin, which keeps its core, or sleep, and must then be woken. On a machine that has
its cores to itself, above all a virtual one, waking takes longer than many of the loops. If other
programs run there too, the thread that is waited for gets no core while the others spin. So the
kernel's record of how long each thread waited for a core decides, while the engine runs.
`python -m bench.micro spinning` measures both.

libgomp, torch's OpenMP on Linux, reads its policy once, when it is loaded. But it spins some
thousand times shorter while it manages more threads than there are cores, and a second team of
threads, which only waits, makes it do so if the first one has all cores. If it has half of them or
fewer, the others leave room for other programs.
"""

import importlib.util
import os
import threading
import time
from collections import deque
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""If one of them is set, its policy holds."""

WINDOW_SECONDS = 0.5
MOST_WAITING = 0.28
"""The share of its time that the thread that waits longest waits for a core, at most.

`python -m bench.micro spinning` shows how long they wait beside other programs, which is about the
same whether they spin or sleep. Beside one that is busy half of the time, two threads on two cores
wait less than this, and are faster if they spin; beside one that always is, both are the opposite.
"""
IDLE_CORES = 0.1
"""A process that uses less than this of a core runs no batches."""

WINDOWS = 4
"""How many windows count together.

Single ones are often busy for the server's own sake, when many answers leave at once. A wait that
grew with each change would let one short program a minute keep the threads asleep for good.
"""

TASKS = Path("/proc/self/task")

ELEMENTS = 1 << 20
"""Of a tensor that torch adds to with all threads."""


def sleep_if_unwatched() -> None:
    """Let OpenMP's threads always sleep if there is no record of how long they wait for cores.

    To be called before torch is imported.
    """
    if not _has_policy() and not _watchable():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _has_policy() -> bool:
    return any(name in os.environ for name in VARIABLES)


def _watchable() -> bool:
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else None
    has_libgomp = any(Path(folder, "lib").glob("libgomp*.so*") for folder in folders or ())
    return has_libgomp and Path("/proc/self/schedstat").exists()


class SpinPolicy:
    """Whether threads should spin, by how long they waited for a core in the last windows."""

    def __init__(self) -> None:
        self.spins = True
        self._waits: deque[float] = deque(maxlen=WINDOWS)

    def record(self, waited: float) -> None:
        """Record that a thread waited for a core for the share ``waited`` of a window."""
        self._waits.append(waited)
        busy = sum(self._waits) > WINDOWS * MOST_WAITING
        # A busy window can be known before the others; that all are quiet cannot.
        if busy == self.spins and (busy or len(self._waits) == WINDOWS):
            self.spins = not busy
            self._waits.clear()


class WaitsForCores:
    """How long the threads of this process waited for a core, as the kernel counts it."""

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = tasks
        self._nanoseconds = self._read()

    def longest(self) -> float:
        """Seconds for which the thread that waited longest did so since the last call."""
        before, self._nanoseconds = self._nanoseconds, self._read()
        waited = (total - before.get(id, 0) for id, total in self._nanoseconds.items())
        return max(waited, default=0) / 1e9

    def _read(self) -> dict[str, int]:
        waited = {}
        for task in self._tasks.iterdir():
            try:
                waited[task.name] = int((task / "schedstat").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # The thread has ended.
        return waited


class Team:
    """A second team of OpenMP's threads, which waits: while it exists, threads hardly spin."""

    def __init__(self) -> None:
        self._end = threading.Event()
        made = threading.Event()
        self._thread = threading.Thread(
            target=self._keep, args=(made,), name="openmp-team", daemon=True
        )
        self._thread.start()
        made.wait()

    def close(self) -> None:
        """End the team's threads."""
        self._end.set()
        self._thread.join()

    def _keep(self, made: threading.Event) -> None:
        import torch  # Not before `sleep_if_unwatched`.

        torch.zeros(ELEMENTS).add_(1)
        made.set()
        self._end.wait()


class Spinning:
    """Watches the threads of this process from one of its own, and lets them spin or sleep."""

    def __init__(self) -> None:
        self._policy = SpinPolicy()
        self._team: Team | None = None
        threading.Thread(target=self._watch, name="spinning", daemon=True).start()

    @classmethod
    def start(cls) -> "Spinning | None":
        """Watch until the process ends; None if the environment or `sleep_if_unwatched` forbids."""
        return None if _has_policy() else cls()

    def _watch(self) -> None:
        waits: WaitsForCores | None = None
        began, used = time.monotonic(), time.process_time()
        while True:
            time.sleep(WINDOW_SECONDS)
            before, began = began, time.monotonic()
            used_before, used = used, time.process_time()
            seconds = began - before
            if used - used_before < IDLE_CORES * seconds:
                waits = None  # No batch ran.
            elif waits is None:
                waits = WaitsForCores()
            else:
                waited = waits.longest() / seconds
                self._policy.record(waited)
                self._apply(waited)

    def _apply(self, waited: float) -> None:
        if self._policy.spins == (self._team is None):
            return
        if self._team is None:
            self._team = Team()
        else:
            self._team.close()
            self._team = None
        what = "spin" if self._policy.spins else "sleep"
        log.info("waiting threads", they=what, waited_for_core=round(waited, 2))
