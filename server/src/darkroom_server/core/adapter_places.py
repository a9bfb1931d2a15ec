"""The places that the operator lets adapters come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom_server.core.engine_config import AdapterSource

ADAPTER_ID = re.compile(r"[\w][\w./-]{0,127}", re.ASCII)
"""What an adapter may be named."""


@dataclass(frozen=True, slots=True)
class AdapterPlaces:
    """Adapters that the operator has named, and a folder, in which files appear and vanish.

    ``packaged`` are those that come with the demo model.
    """

    named: tuple[AdapterSource, ...] = ()
    folder: Path | None = None
    packaged: tuple[AdapterSource, ...] = ()

    def sources(self) -> tuple[AdapterSource, ...]:
        """Every adapter that can be offered now.

        One that was named wins over a file, and a file over a packaged one.
        """
        found = {source.id: source for source in self.named}
        for source in (*self._in_folder(), *self.packaged):
            found.setdefault(source.id, source)
        return tuple(found.values())

    def _in_folder(self) -> Iterator[AdapterSource]:
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            if ADAPTER_ID.fullmatch(file.stem):
                yield AdapterSource(id=file.stem, location=str(file), from_folder=True)

    @property
    def configured(self) -> bool:
        """There are adapters, or a folder in which some may appear."""
        return bool(self.named or self.packaged) or self.folder is not None
