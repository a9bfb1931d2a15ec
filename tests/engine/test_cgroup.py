"""The limits of control groups, read from files such as Linux shows them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from darkroom_server.engine.device import cgroup
from darkroom_server.engine.warmup.presets import allowed_threads

SECOND = "0::/system.slice/darkroom.service\n"
FIRST = "7:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the files of the groups."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(cgroup, "ROOT", root)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    return root


def write(root: Path, membership: str, files: Mapping[str, str]) -> None:
    cgroup.MEMBERSHIP.write_text(membership)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def test_without_groups_nothing_is_limited(machine: Path) -> None:
    assert cgroup.cores() is None
    assert cgroup.free_memory() is None
    write(machine, "0::/\n", {})
    assert cgroup.cores() is None
    assert cgroup.free_memory() is None


def test_in_a_container_the_group_is_the_root(machine: Path) -> None:
    limits = {"cpu.max": "150000 100000", "memory.max": "6000", "memory.current": "5000"}
    write(machine, "0::/\n", limits)
    assert cgroup.cores() == 1.5
    assert cgroup.free_memory() == 1000


def test_the_tightest_group_above_counts(machine: Path) -> None:
    write(
        machine,
        SECOND,
        {
            "system.slice/darkroom.service/cpu.max": "max 100000",
            "system.slice/darkroom.service/memory.max": "max",
            "system.slice/darkroom.service/memory.current": "100",
            "system.slice/cpu.max": "200000 100000",
            "system.slice/memory.max": "900",
            "system.slice/memory.current": "300",
            "system.slice/memory.stat": "anon 100\nfile 150\nshmem 20\nfile_mapped 30",
        },
    )
    assert cgroup.cores() == 2
    assert cgroup.free_memory() == 900 - 300 + (150 - 20 - 30)


def test_the_first_version(machine: Path) -> None:
    write(
        machine,
        FIRST,
        {
            # In a container the mount shows its own group as the root.
            "cpu/cpu.cfs_quota_us": "50000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "4000",
            "memory/memory.usage_in_bytes": "3500",
            "memory/memory.stat": "cache 9\ntotal_cache 600\ntotal_shmem 0\ntotal_mapped_file 50",
        },
    )
    assert cgroup.cores() == 0.5
    assert cgroup.free_memory() == 1050
    assert allowed_threads() == 1, "half a core is one thread"
    unlimited = {
        "cpu/cpu.cfs_quota_us": "-1",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    write(machine, FIRST, unlimited)
    assert cgroup.cores() is None
    assert cgroup.free_memory() is None


def test_old_kernels_report_less(machine: Path) -> None:
    limits = {"memory/memory.limit_in_bytes": "4000", "memory/memory.usage_in_bytes": "3500"}
    write(machine, FIRST, limits)
    assert cgroup.free_memory() == 500
    write(machine, FIRST, limits | {"memory/memory.stat": "cache 5\ntotal_cache 400"})
    assert cgroup.free_memory() == 900


def test_more_than_the_limit_leaves_nothing(machine: Path) -> None:
    write(machine, "0::/\n", {"memory.max": "100", "memory.current": "120"})
    assert cgroup.free_memory() == 0
