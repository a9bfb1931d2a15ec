"""Loads of a peer's server, which take as long as those of real models."""

import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from bench.trace.costs import BYTES, TO_DEVICE, TO_HOST
from bench.trace.figures import Swaps
from bench.trace.peers.config import PeerConfig

Model = TypeVar("Model")


class CostedLoads(Generic[Model]):
    """Loads models, and keeps the file of the loads up to date.

    The host's memory keeps those that were loaded last; ``make`` reads the others.
    """

    def __init__(self, config: PeerConfig, make: Callable[[str], Model]) -> None:
        self._make = make
        self._read_seconds = config.load_scale * BYTES / TO_HOST
        self._copy_seconds = config.load_scale * BYTES / TO_DEVICE
        self._most = config.host_models
        self._held: OrderedDict[str, Model] = OrderedDict()
        self._path = Path(config.swaps)
        self._swaps = Swaps(loads=0, from_disk=0, bytes_moved=0, seconds=0.0, longest_wait=0.0)
        self._lock = Lock()
        self._save()

    def load(self, name: str) -> Model:
        """A model, after what its load takes now; always on the same thread."""
        reads = name not in self._held
        seconds = self._copy_seconds + reads * self._read_seconds
        time.sleep(seconds)
        if reads:
            self._held[name] = self._make(name)
        self._held.move_to_end(name)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        swaps = self._swaps
        self._save(
            loads=swaps.loads + 1,
            from_disk=swaps.from_disk + reads,
            bytes_moved=swaps.bytes_moved + BYTES * (1 + reads),
            seconds=swaps.seconds + seconds,
        )
        return self._held[name]

    def waited(self, seconds: float) -> None:
        """A request waited for its model."""
        if seconds > self._swaps.longest_wait:
            self._save(longest_wait=seconds)

    def _save(self, **changed: Any) -> None:
        # Replaced as a whole: the process may be killed.
        with self._lock:
            self._swaps = replace(self._swaps, **changed)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(asdict(self._swaps)), encoding="utf-8")
            os.replace(new, self._path)
