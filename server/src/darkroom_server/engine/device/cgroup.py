"""The CPU and memory limits of this process's control groups, versions 1 and 2.

A group's limit holds for all groups below it, so every group from the process's own up to the root
is read (kernel documentation, admin-guide/cgroup-v1 and cgroup-v2). In a container /proc may show
the host's path while the mount shows the container's group as the root: missing files are skipped.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""In version 1, "no limit" is a number of bytes close to 2^63."""


def cores() -> float | None:
    """The cores that a quota allows, None without a quota."""
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
    """The bytes that are free below the limit, None without a limit.

    The kernel counts its file cache as used, such as weights just downloaded. The cache counts as
    free here, because the kernel evicts it when memory is needed.
    """
    found = []
    for group in _groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit != ["max"] and int(limit[0]) < UNLIMITED:
            found.append(max(0, int(limit[0]) - int(used[0]) + _kept_files(group)))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the process's group and of all groups above it."""
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
    """Bytes of cached files that no process maps; without tmpfs, which cannot be evicted."""
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
