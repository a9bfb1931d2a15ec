"""What the control groups leave to this process of the machine, by Linux's own files.

A group's limit holds for all below it, so every group from the process's own up to the root is
asked, version 1 and 2 (kernel documentation, admin-guide/cgroup-v1 and cgroup-v2). In a container
the path that the process is told may be the host's, while the mount shows the container's own group
as the root: what is not there is passed over.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""Version 1 says "no limit" by a number of bytes close to 2^63."""


def cores() -> float | None:
    """The cores that a quota leaves, None where there is none."""
    found = []
    for group in _groups("cpu"):
        words = _words(group / "cpu.max") or [
            *_words(group / "cpu.cfs_quota_us"),
            *_words(group / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def free_memory() -> int | None:
    """The bytes that a limit leaves, None where there is none.

    Files that the kernel keeps in memory count as used there, such as weights just downloaded, but
    make way when memory is asked for.
    """
    found = []
    for group in _groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit != ["max"] and int(limit[0]) < UNLIMITED:
            found.append(max(0, int(limit[0]) - int(used[0]) + _kept_files(group)))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the process's group and of all above it."""
    try:
        memberships = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = ROOT / controller if controllers else ROOT
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _kept_files(group: Path) -> int:
    """Bytes of files in memory that no process maps; tmpfs is counted among files, but stays."""
    words = _words(group / "memory.stat")
    stat = dict(zip(words[::2], words[1::2], strict=False))
    names = ("file", "shmem", "file_mapped")
    if "total_cache" in stat:
        names = ("total_cache", "total_shmem", "total_mapped_file")
    files, stay, mapped = (int(stat.get(name, 0)) for name in names)
    return max(0, files - stay - mapped)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
