"""Which weights a model has: distinguishes two models of the same name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.engine.loading.folder import INDEX
from darkroom_server.engine.weights.digests import digest_of_all

UNKNOWN = "unknown"


def revision_of(source: ModelSource, pipeline: Any) -> str:
    """The hub's commit, or a fingerprint of the files if the model is local."""
    path = Path(source.location).expanduser()
    if path.is_file():
        return _fingerprint([path], path.parent)
    if path.is_dir():
        # Other files at the top, such as the same weights in one file, were not loaded.
        files = [f for f in path.glob("*/*") if f.suffix in (".json", ".txt", ".safetensors")]
        return _fingerprint([path / INDEX, *files], path)
    # The hub's cache keeps a model under snapshots/COMMIT.
    folder = Path(str(pipeline.name_or_path))
    if folder.parent.name == "snapshots":
        return folder.name
    return source.revision or UNKNOWN


def _fingerprint(files: Iterable[Path], root: Path) -> str:
    return f"sha256:{digest_of_all(files, root)[:16]}"
