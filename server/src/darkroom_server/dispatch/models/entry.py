"""What the catalogue knows of one model, and how long loads take."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from darkroom_server.core.catalog import ModelState, WeightOrigin

FIRST_LOAD_SECONDS, FIRST_BYTES_PER_SECOND = 2.0, 5e8
"""What a load takes before one was measured: a disk's pace, and what every load needs."""

FIRST_COPY_SECONDS, FIRST_COPIED_BYTES_PER_SECOND = 0.5, 5e9
"""The same of a load whose weights are in the host's memory."""


@dataclass(slots=True)
class CatalogEntry:
    """One model of the catalogue.

    ``weight_bytes``: 0 until they are known. ``deaths``: engines that died while they loaded it,
    since it was last loaded. ``load_seconds`` and ``host_seconds``: its last load from files and
    from the host's memory, None if there was none; ``read_seconds``: its last read into the host's
    memory, None if it was loaded from its files at once since then. ``location``: its folder or
    file, None for one of the hub; ``stamp``: that of its files when it was loaded, ``changed``:
    they were written since; ``described``: that of the files that it was described from, "" if it
    is not known. ``shared``: see ``Resident``, as of its last load. ``copies_fail``: an engine
    could not load it while another one had it, so no further engine tries. ``fetched_bytes`` and
    ``fetch_bytes`` are those of a download that runs. ``waiters``: calls that wait until it is
    loaded. ``reported``: the state that the observer knows.
    """

    id: str
    pinned: bool = False
    weight_bytes: int = 0
    deaths: int = 0
    load_seconds: float | None = None
    host_seconds: float | None = None
    read_seconds: float | None = None
    location: Path | None = None
    stamp: str = ""
    described: str = ""
    changed: bool = False
    shared: Mapping[str, int] = field(default_factory=dict)
    copies_fail: bool = False
    fetched_bytes: int = 0
    fetch_bytes: int = 0
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    reported: ModelState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a load is; ``remaining_seconds`` is None if that is not known."""

    fetched_bytes: int
    fetch_bytes: int
    remaining_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogStatus:
    """Where a model is; ``last_used`` is in Unix seconds, None if no job used it.

    ``changed``: its files were written since it was loaded. ``ready``: an engine has it, or had it
    when it died. ``reason``: why it cannot be loaded, empty
    if it can. ``load`` is set while it is being loaded.
    """

    state: ModelState
    ready: bool
    reason: str
    weight_bytes: int
    last_used: float | None
    pinned: bool
    load: LoadProgress | None
    changed: bool = False


class LoadPace:
    """How long a load takes: as the last one of the model, or by its bytes and other loads.

    Loads from files and from the host's memory are apart.
    """

    def __init__(self) -> None:
        self._from_files = _Pace(FIRST_LOAD_SECONDS, FIRST_BYTES_PER_SECOND)
        self._from_host = _Pace(FIRST_COPY_SECONDS, FIRST_COPIED_BYTES_PER_SECOND)

    def record(self, entry: CatalogEntry, seconds: float, origin: WeightOrigin) -> None:
        """A model of ``entry`` took ``seconds`` to load."""
        if origin is WeightOrigin.HOST:
            entry.host_seconds = seconds
            self._from_host.record(entry.weight_bytes, seconds)
        else:
            entry.load_seconds, entry.read_seconds = seconds, None
            self._from_files.record(entry.weight_bytes, seconds)

    def record_read(self, entry: CatalogEntry, seconds: float) -> None:
        """The weights of ``entry`` took ``seconds`` to read; a load of them copies them too."""
        entry.read_seconds = seconds
        copy = self.expected(entry, in_host=True)
        self._from_files.record(entry.weight_bytes, seconds + copy)

    def expected(self, entry: CatalogEntry, *, in_host: bool = False) -> float:
        """Seconds that a load of the model probably takes."""
        if not in_host and entry.read_seconds is not None:
            return entry.read_seconds + self.expected(entry, in_host=True)
        if not in_host:
            return _known_or(entry.load_seconds, self._from_files, entry.weight_bytes)
        if entry.host_seconds is None and entry.load_seconds is not None:
            # A copy takes no longer than what precedes it.
            return min(entry.load_seconds, self._from_host.expected(entry.weight_bytes))
        return _known_or(entry.host_seconds, self._from_host, entry.weight_bytes)


class _Pace:
    """Seconds by bytes: ``seconds`` and ``rate`` until a load was measured."""

    def __init__(self, seconds: float, rate: float) -> None:
        self._first, self._rate = seconds, rate
        self._seconds = self._bytes = 0.0

    def record(self, size: int, seconds: float) -> None:
        if size > 0:
            self._seconds += seconds
            self._bytes += size

    def expected(self, size: int) -> float:
        if not self._bytes:
            return self._first + size / self._rate
        return self._seconds * size / self._bytes


def _known_or(seconds: float | None, pace: _Pace, size: int) -> float:
    return pace.expected(size) if seconds is None else seconds
