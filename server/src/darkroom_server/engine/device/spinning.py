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
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""If one of them is set, its policy holds."""

WINDOW_SECONDS = 0.5
MOST_WAITING = 0.15
"""The share of a window for which a thread may wait for a core on a machine that is not busy.

Measured with two threads on two cores: 0.01 to 0.06 without other programs, 0.42 and more with one,
both for threads that spin and for threads that sleep.
"""
IDLE_CORES = 0.1
"""A process that uses less than this of a core runs no batches."""

QUIET_SECONDS = 2.0
"""After a busy window, threads sleep until no window was busy for this long.

A wrong try to spin costs about one window; sleeping costs about half of the time that it lasts. So
after a wait of a few windows, programs that come again at any interval cost little more than under
the best choice in hindsight. A wait that grew would let one short program a minute keep the threads
asleep for good.
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
    """Whether threads should spin, by how long they waited for a core in each window of time.

    They stop after one busy window, and start after ``QUIET_SECONDS``.
    """

    def __init__(self) -> None:
        self.spins = True
        self._quiet_for = 0.0

    def record(self, waited: float, seconds: float) -> None:
        """Record that a thread waited for a core for the share ``waited`` of ``seconds``."""
        if waited > MOST_WAITING:
            self.spins, self._quiet_for = False, 0.0
            return
        self._quiet_for += seconds
        self.spins = self.spins or self._quiet_for >= QUIET_SECONDS


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
                self._policy.record(waited, seconds)
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
