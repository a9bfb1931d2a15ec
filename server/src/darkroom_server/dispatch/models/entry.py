"""What the catalogue knows of one model, and how long loads take."""

import asyncio
from dataclasses import dataclass, field

from darkroom_server.core.catalog import ModelState

FIRST_LOAD_SECONDS, FIRST_BYTES_PER_SECOND = 2.0, 5e8
"""What a load takes before one was measured: a disk's pace, and what every load needs."""


@dataclass(slots=True)
class CatalogEntry:
    """One model of the catalogue.

    ``weight_bytes``: 0 until they are known. ``deaths``: engines that died while they loaded it,
    since it was last loaded. ``load_seconds``: its last load, None if there was none.
    ``fetched_bytes`` and ``fetch_bytes`` are those of a download that runs. ``waiters``: calls that
    wait until it is loaded. ``reported``: the state that the observer knows.
    """

    id: str
    pinned: bool = False
    weight_bytes: int = 0
    deaths: int = 0
    load_seconds: float | None = None
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

    ``ready``: an engine has it, or had it when it died. ``reason``: why it cannot be loaded, empty
    if it can. ``load`` is set while it is being loaded.
    """

    state: ModelState
    ready: bool
    reason: str
    weight_bytes: int
    last_used: float | None
    pinned: bool
    load: LoadProgress | None


class LoadPace:
    """How long a load takes: as the last one of the model, or by its bytes and other loads."""

    def __init__(self) -> None:
        self._seconds = FIRST_LOAD_SECONDS
        self._bytes = FIRST_LOAD_SECONDS * FIRST_BYTES_PER_SECOND
        self._measured = False

    def record(self, entry: CatalogEntry, seconds: float) -> None:
        """A model of ``entry`` took ``seconds`` to load."""
        entry.load_seconds = seconds
        if entry.weight_bytes <= 0:
            return
        if not self._measured:
            self._measured, self._seconds, self._bytes = True, 0.0, 0.0
        self._seconds += seconds
        self._bytes += entry.weight_bytes

    def expected(self, entry: CatalogEntry) -> float:
        """Seconds that a load of the model probably takes."""
        if entry.load_seconds is not None:
            return entry.load_seconds
        if not self._measured:
            return FIRST_LOAD_SECONDS + entry.weight_bytes / FIRST_BYTES_PER_SECOND
        return self._seconds * entry.weight_bytes / self._bytes
