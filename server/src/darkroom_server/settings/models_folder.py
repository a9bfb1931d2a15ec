"""Finds the models below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

INDEX = "model_index.json"

COMPONENT = "config.json"
"""In a folder with this file, weights are those of one component, such as a ControlNet."""

SUFFIX = ".safetensors"


def models_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each pipeline folder and single file below ``folder``.

    The name is the path from ``folder``, without the ending of a file. Links are followed.
    """
    seen: set[Path] = set()
    for path, inner, files in os.walk(folder, followlinks=True):
        here = Path(path)
        resolved = here.resolve()
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if resolved in seen:  # A link to a folder above.
            inner.clear()
            continue
        seen.add(resolved)
        if INDEX in files:
            inner.clear()
            yield (resolved.name if here == folder else here.relative_to(folder).as_posix()), here
        elif COMPONENT in files:
            inner.clear()
        else:
            for name in sorted(files):
                if name.endswith(SUFFIX) and not name.startswith("."):
                    relative = (here / name).relative_to(folder)
                    yield relative.as_posix().removesuffix(SUFFIX), here / name
