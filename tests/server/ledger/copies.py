"""What a killed server leaves behind."""

import shutil
from pathlib import Path


def left_behind(path: Path, name: str = "after.db") -> Path:
    """A copy of the ledger at ``path`` as it would be if its server died now."""
    copy = path.with_name(name)
    for ending in ("", "-wal"):
        if (file := Path(f"{path}{ending}")).exists():
            shutil.copy(file, f"{copy}{ending}")
    return copy
