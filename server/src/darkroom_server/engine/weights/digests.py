"""Digests of files of weights, each read once as long as it does not change."""

import hashlib
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from darkroom_server.core.file_stamps import stamp_of

HUB_BLOB = re.compile(r"[0-9a-f]{64}")
"""The name of a large file in the hub's cache, which is the SHA-256 of what it holds."""


def digest_of(file: Path) -> bytes:
    """The SHA-256 of ``file``. Raises ``OSError``."""
    target = file.resolve()
    if target.parent.name == "blobs" and HUB_BLOB.fullmatch(target.name):
        return bytes.fromhex(target.name)
    return _read(os.fspath(target), stamp_of(target))


def digest_of_all(files: Iterable[Path], root: Path) -> str:
    """A digest of the names below ``root`` and of what ``files`` hold, in hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(digest_of(file))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _read(path: str, stamp: str) -> bytes:
    """The SHA-256 of a file that had ``stamp``."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
