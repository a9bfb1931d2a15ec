"""Atomic file writes."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write ``data`` to ``path`` atomically: no reader ever sees a part of it.

    Raises ``FileExistsError`` if ``path`` exists and ``overwrite`` is false. The file system
    itself checks this, so there is no race.
    """
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    # Beside the target: a rename is atomic only within one file system.
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    # 0o666 minus the umask, as for any other file; tempfile would make it private.
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if overwrite:
            os.replace(draft, path)
        else:
            _move_to_new(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _move_to_new(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it") from None
    except OSError:
        # A file system without hard links: create the name first, then replace it in one move.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(draft, path)
