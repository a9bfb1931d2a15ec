"""The folder below which the server writes: measurements, compiled code, temporary files."""

import os
from collections.abc import Mapping
from pathlib import Path

from darkroom_server.settings.tree import Settings, Storage

SCRATCH = {
    "TMPDIR": "tmp",
    "CUDA_CACHE_PATH": "cuda",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
}
"""Variables that name the folders in which the engine's libraries write, and ours for each.

Torch cannot be imported without a writable folder for temporary files.
"""


def state_folder(storage: Storage) -> Path | None:
    """``--state-dir``, or a folder in the user's cache; None for a user without a home.

    The cache is that of the XDG base directory specification.
    """
    try:
        if storage.state_dir:
            return Path(storage.state_dir).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The specification: a relative path is invalid and is ignored.
        cache = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return cache / "darkroom"


def measurement_folder(settings: Settings) -> Path | None:
    """The folder that remembers measurements and load times; None if nothing is remembered."""
    folder = state_folder(settings.storage)
    if not settings.engine.measurement_cache or folder is None:
        return None
    return folder / "measurements"


def compiled_folder(settings: Settings) -> Path | None:
    """The folder of compiled denoisers; None if nothing is remembered."""
    measurements = measurement_folder(settings)
    return measurements and measurements.with_name("compiled")


def create_scratch_folders(storage: Storage, environ: Mapping[str, str]) -> dict[str, str]:
    """Create the folders of ``SCRATCH`` below ``--state-dir``; return the variables to set.

    Variables that ``environ`` has stay as they are. Without ``--state-dir``, nothing is created.
    Raises ``OSError``.
    """
    folder = state_folder(storage) if storage.state_dir else None
    if folder is None:
        return {}
    variables = {name: folder / below for name, below in SCRATCH.items() if not environ.get(name)}
    for path in variables.values():
        path.mkdir(parents=True, exist_ok=True)
    return {name: str(path) for name, path in variables.items()}
