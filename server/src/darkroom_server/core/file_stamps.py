"""Whether a model's files were written since they were read, without reading them again."""

import hashlib
from pathlib import Path


def stamp_of(location: Path) -> str:
    """A digest of the names, inodes, sizes and times of change of a model's files.

    ``location``: a pipeline folder or a single file. Raises ``OSError``.
    """
    files = [location]
    if location.is_dir():
        found = (*location.glob("*.json"), *location.glob("*/*"))
        files = [file for file in sorted(found) if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def stamp_or_none(location: Path) -> str:
    """The stamp of a model's files, "" if they are not there."""
    try:
        return stamp_of(location)
    except OSError:
        return ""
