"""Remembers measurements on disk, one JSON file for each key. Knows no torch.

A cache must never stop a start: a file that is broken or foreign, or a folder that cannot be
written, is logged and ignored.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import structlog

log = structlog.get_logger(__name__)

VERSION = 3
"""Of the file's format and of the way to measure; another version is measured again."""

LARGEST_BYTES = 65536
"""A larger file is not one of ours."""

LARGEST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What a model takes on a device; see ``MemoryNeeds`` and ``ModelSpeed`` for the units.

    ``max_rows`` is the best row limit, ``passes`` are pairs of rows and seconds of a batch.
    ``sdpa_seconds`` are those of a batch of two rows with SDPA and without autocast, 0 if it was
    not measured.
    """

    max_rows: int
    passes: tuple[tuple[int, float], ...]
    decode: float
    encode: float
    bytes_per_row: int
    bytes_per_pass: int
    bytes_per_decode: int
    sdpa_bytes_per_row: int = 0
    sdpa_seconds: float = 0.0

    @classmethod
    def read(cls, data: Any) -> Self:
        """The measurements in ``data``, as JSON gives them. Raises ``ValueError``."""
        if not isinstance(data, dict) or set(data) != set(cls.__dataclass_fields__):
            raise ValueError("its fields are not those of measurements")
        passes = data["passes"]
        if not isinstance(passes, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and _is_rows(pair[0]) and _is_time(pair[1])
            for pair in passes
        ):
            raise ValueError("its passes are not rows and seconds")
        if not _is_rows(data["max_rows"]) or data["max_rows"] < 2 or not _is_time(data["decode"]):
            raise ValueError("its row limit or decode time is not plausible")
        if not all(data[name] == 0 or _is_time(data[name]) for name in ("encode", "sdpa_seconds")):
            raise ValueError("its times of an encode and of SDPA are not plausible")
        sizes = [value for name, value in data.items() if "bytes" in name]
        if not all(type(size) is int and 0 <= size < 2**50 for size in sizes):
            raise ValueError("its memory is not plausible")
        return cls(**{**data, "passes": tuple((rows, float(s)) for rows, s in passes)})


class MeasurementCache:
    """The measurements of one model in ``folder``, under the digest of ``key``.

    With ``folder`` None nothing is remembered. ``key`` is everything that the measurements depend
    on, as plain data.
    """

    def __init__(self, folder: str | None, key: Mapping[str, Any]) -> None:
        text = json.dumps({"version": VERSION, **key}, sort_keys=True, default=str)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        self._file = Path(folder) / f"{self._digest[:32]}.json" if folder else None
        self._measurements: Measurements | None = None

    def load(self) -> Measurements | None:
        """What an earlier start measured, None if nothing usable is there."""
        if self._file is None:
            return None
        try:
            with self._file.open("rb") as file:
                raw = file.read(LARGEST_BYTES + 1)
            if len(raw) > LARGEST_BYTES:
                raise ValueError("it is too large")
            data = json.loads(raw)
            if not isinstance(data, dict) or data.get("key") != self._digest:
                raise ValueError("it is of another key")
            self._measurements = Measurements.read(data.get("measurements"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("measurement cache ignored", file=str(self._file), why=str(error))
            return None
        return self._measurements

    def save(self, measurements: Measurements) -> None:
        """Remember ``measurements``; concurrent starts see the old file or the new one."""
        self._measurements = measurements
        if self._file is None:
            return
        data = {"key": self._digest, "measurements": asdict(measurements)}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._file.parent, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(data, file)
                Path(name).replace(self._file)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            log.warning("measurements not remembered", file=str(self._file), why=str(error))

    def save_row_limit(self, max_rows: int) -> None:
        """Remember that real batches changed the row limit."""
        if self._measurements is not None:
            self.save(replace(self._measurements, max_rows=max_rows))


def _is_rows(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_ROWS


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value < 1e5
