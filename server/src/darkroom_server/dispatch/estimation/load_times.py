"""How long the models take to load: the last load's seconds, remembered on disk."""

import json
import math
import time
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

LARGEST_BYTES = 65536
"""A larger file is not one of ours."""


class LoadTimes:
    """The load that runs now, beside the last load of the same models on the same device.

    ``file``: remembers the seconds of each ``key``; None remembers nothing.
    """

    def __init__(self, file: Path | None = None, key: str = "") -> None:
        self._file = file
        self._key = key
        self._began = time.monotonic()
        self._recorded = False
        self.expected = self._read().get(key)

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began

    @property
    def remaining(self) -> float | None:
        """Seconds until the models are loaded, by the last load; None if that is not known."""
        if self.expected is None or self.elapsed >= self.expected:
            return None
        return self.expected - self.elapsed

    def begin(self) -> None:
        """The load begins."""
        self._began = time.monotonic()

    def record(self) -> None:
        """The models are loaded. Later calls change nothing: they are for engines that restart."""
        if self._recorded:
            return
        self._recorded = True
        if self._file is None:
            return
        seconds = {**self._read(), self._key: max(0.001, round(self.elapsed, 3))}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            written = self._file.with_suffix(".tmp")
            written.write_text(json.dumps(seconds), encoding="utf-8")
            written.replace(self._file)
        except OSError as error:
            log.warning("load time not remembered", file=str(self._file), why=str(error))

    def _read(self) -> dict[str, float]:
        """The remembered seconds, by key."""
        if self._file is None:
            return {}
        try:
            with self._file.open("rb") as file:
                raw = file.read(LARGEST_BYTES + 1)
            data = json.loads(raw) if len(raw) <= LARGEST_BYTES else None
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("load times ignored", file=str(self._file), why=str(error))
            return {}
        if not isinstance(data, dict):
            log.warning("load times ignored", file=str(self._file), why="it holds something else")
            return {}
        return {key: float(value) for key, value in data.items() if _is_seconds(value)}


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
