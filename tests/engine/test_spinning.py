"""The engine's threads spin on a quiet machine, and sleep on a busy one."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from darkroom_server.engine.device import spinning
from darkroom_server.engine.device.spinning import (
    MOST_WAITING,
    WINDOWS,
    SpinPolicy,
    Team,
    WaitsForCores,
)

BUSY, QUIET = MOST_WAITING + 0.1, MOST_WAITING - 0.1


def windows_until(policy: SpinPolicy, spins: bool, waited: float) -> int:
    """How many windows of ``waited`` it takes until the threads spin, or sleep."""
    count = 0
    while policy.spins != spins:
        policy.record(waited)
        count += 1
        assert count < 100
    return count


def test_threads_spin_until_the_last_windows_are_busy_and_again_when_they_are_quiet() -> None:
    policy = SpinPolicy()
    for _ in range(1000):
        policy.record(QUIET)
    assert policy.spins
    assert windows_until(policy, False, BUSY) <= WINDOWS
    assert windows_until(policy, True, QUIET) == WINDOWS


def test_a_single_busy_window_among_quiet_ones_changes_nothing() -> None:
    policy = SpinPolicy()
    for _ in range(100):
        for waited in (0.4, 0.05, 0.1, 0.05):
            policy.record(waited)
            assert policy.spins


def test_a_thread_that_gets_no_core_at_all_is_noticed_sooner() -> None:
    assert windows_until(SpinPolicy(), False, 1.0) == 2


def test_programs_that_come_again_keep_threads_asleep_no_longer() -> None:
    policy = SpinPolicy()
    for _ in range(8):
        windows_until(policy, False, BUSY)
        assert windows_until(policy, True, QUIET) == WINDOWS


def test_the_thread_that_waited_longest_counts_and_ended_threads_do_not(tmp_path: Path) -> None:
    def write(id: int, waited: int) -> None:
        (tmp_path / str(id)).mkdir(exist_ok=True)
        (tmp_path / str(id) / "schedstat").write_text(f"123 {waited} 7\n")

    write(1, 500_000_000)
    write(2, 0)
    (tmp_path / "3").mkdir()  # Ended between two reads.
    waits = WaitsForCores(tmp_path)
    assert waits.longest() == 0
    write(1, 600_000_000)
    write(2, 250_000_000)
    write(4, 50_000_000)
    assert waits.longest() == 0.25
    assert waits.longest() == 0


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel counts no waits")
def test_the_kernel_counts_the_wait_for_a_core_that_another_process_uses() -> None:
    core = str(min(os.sched_getaffinity(0)))
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            assert other.stdout.readline()

            def work() -> None:
                os.sched_setaffinity(0, {int(core)})
                waits, waited = WaitsForCores(), 0.0
                while waited < 0.01:
                    waited += waits.longest()

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
        finally:
            other.kill()


def test_a_team_adds_threads_and_ends_them() -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    assert "openmp-team" not in names()
    team = Team()
    assert "openmp-team" in names()
    team.close()
    assert "openmp-team" not in names()


CHILD = """
import json, os, sys
from darkroom_server.engine.device import spinning
if sys.argv[1] == "unknown":
    spinning._watchable = lambda: False
spinning.sleep_if_unwatched()
import torch
watch = spinning.Spinning.start()
print(json.dumps([os.environ.get("OMP_WAIT_POLICY"), watch is not None]))
"""


@pytest.mark.parametrize(
    ("openmp", "set_to", "expected"),
    [
        ("known", None, [None, True]),
        ("known", "ACTIVE", ["ACTIVE", False]),
        ("unknown", None, ["PASSIVE", False]),
        ("unknown", "ACTIVE", ["ACTIVE", False]),
    ],
)
@pytest.mark.skipif(not spinning._watchable(), reason="torch has no libgomp here")
def test_threads_sleep_without_a_record_of_waits_and_the_environment_decides_first(
    openmp: str, set_to: str | None, expected: list[object]
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in spinning.VARIABLES}
    if set_to:
        environment["OMP_WAIT_POLICY"] = set_to
    run = [sys.executable, "-c", CHILD, openmp]
    out = subprocess.run(run, env=environment, stdout=subprocess.PIPE, check=True)
    assert json.loads(out.stdout) == expected
