"""Adapters in memory: read while their jobs wait, the least recently used evicted."""

import errno
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import Failure
from darkroom_server.core.events import AdapterEvicted, AdapterLoaded, Event
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.adapters.reading import AdapterMismatch, parse_adapter
from darkroom_server.engine.adapters.sources import AdapterFound, find_adapter
from darkroom_server.engine.failures import adapter_unusable, one_line

log = structlog.get_logger(__name__)

Key = tuple[str, str]
"""The ids of a model and of an adapter."""


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """The file of an adapter was read: its ``data``, or why not. ``began`` is monotonic."""

    key: Key
    file: Path
    data: bytes | Exception
    began: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """The jobs that an adapter's arrival lets go on, and those that fail without it."""

    ready: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSetup:
    """The files of the adapters by id, and the limits of batches and of memory.

    ``withdrawn`` are those that jobs may still use, but whose memory is freed when none does.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    withdrawn: frozenset[str] = frozenset()
    max_in_batch: int = 0
    max_rank: int = 0
    cache_bytes: int = 0


NO_ADAPTERS = AdapterSetup()


class AdapterStore:
    """The adapters of all models in memory, within the limit of ``setup``, unless in use.

    Files are found and read on a thread of the store's own, which passes each to ``receive``; all
    else is used from the loop's thread only. ``unwanted`` are those in memory that are to be freed
    once no job uses them.
    """

    def __init__(
        self,
        models: Mapping[str, ModelAdapters],
        setup: AdapterSetup,
        receive: Callable[[AdapterRead | AdapterFound], None],
        emit: Callable[[Event], None],
    ) -> None:
        self.unwanted: set[Key] = set()
        self._models = models
        self._files = dict(setup.files)
        self._withdrawn = set(setup.withdrawn)
        self._max_bytes = setup.cache_bytes
        self._receive = receive
        self._emit = emit
        self._bytes: OrderedDict[Key, int] = OrderedDict()
        self._waiting: dict[str, set[Key]] = {}
        self._reading: set[Key] = set()
        self._outdated: set[Key] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-adapter")

    def request(self, job: Job) -> bool:
        """Whether the adapters of ``job`` are in memory; those that are not are read soon."""
        keys = [(job.model, lora.id) for lora in job.loras]
        missing = {key for key in keys if key not in self._bytes}
        for key in keys:
            if key in self._bytes:
                self._bytes.move_to_end(key)
        if not missing:
            return True
        self._waiting[job.id] = missing
        for key in missing - self._reading:
            self._reading.add(key)
            self._reader.submit(self._read, key, self._files.get(key[1]))
        return False

    def add(self, read: AdapterRead, in_use: Collection[Key]) -> Arrived:
        """Keep an adapter that was read; those that are not ``in_use`` may be evicted for it."""
        if read.key in self._outdated:
            self._outdated.discard(read.key)
            self._reader.submit(self._read, read.key, self._files.get(read.key[1]))
            return Arrived()
        self._reading.discard(read.key)
        failure = self._keep(read, in_use)
        jobs = [id for id, missing in self._waiting.items() if read.key in missing]
        ready = []
        for id in jobs:
            self._waiting[id].discard(read.key)
            if failure is None and self._waiting[id]:
                continue
            del self._waiting[id]
            ready.append(id)
        return Arrived(ready) if failure is None else Arrived(failed=dict.fromkeys(ready, failure))

    def find(self, source: AdapterSource) -> None:
        """Look for the file of an adapter, and pass it to ``receive``."""
        self._reader.submit(lambda: self._receive(find_adapter(source)))

    def offer(self, source: AdapterSource) -> None:
        """Read the adapter from now on from the file that ``source`` names."""
        self._withdrawn.discard(source.id)
        self._files[source.id] = Path(source.location)
        # The file may have other weights than the one of that name before.
        self.unwanted |= {key for key in self._bytes if key[1] == source.id}
        self._outdated |= {key for key in self._reading if key[1] == source.id}

    def withdraw(self, id: str) -> None:
        """Free the adapter's memory once no job uses it, also if a job reads it again."""
        self._withdrawn.add(id)
        self.unwanted |= {key for key in self._bytes if key[1] == id}

    def free(self, in_use: Collection[Key]) -> None:
        """Evict the ``unwanted`` adapters that are not ``in_use``."""
        for key in self.unwanted.difference(in_use):
            self._evict(key)

    def forget(self, model_id: str) -> None:
        """Evict every adapter of a model, which is gone after that."""
        for key in [key for key in self._bytes if key[0] == model_id]:
            self._evict(key)

    def close(self) -> None:
        """Stop to read."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, key: Key, file: Path | None) -> None:
        # No torch here: it would keep a pool of threads for this one. Never mapped: if the file is
        # cut short meanwhile, its adapter is damaged, while a mapped one would kill the engine.
        began = time.monotonic()
        data: bytes | Exception = FileNotFoundError(errno.ENOENT, "its file is not there")
        try:
            if file is not None:
                data = file.read_bytes()
        except (OSError, MemoryError) as error:
            data = error
        self._receive(AdapterRead(key, file or Path(), data, began))

    def _keep(self, read: AdapterRead, in_use: Collection[Key]) -> Failure | None:
        """Keep an adapter that was read; returns why its jobs fail, None if they go on."""
        model_id, id = read.key
        try:
            if isinstance(read.data, Exception):
                raise read.data
            model = self._models.get(model_id)
            if model is None:  # It was unloaded meanwhile.
                raise AdapterMismatch("its model has no adapters")
            model.add(parse_adapter(read.data, read.file, id, model.pipeline))
        except (AdapterMismatch, OSError, MemoryError) as error:
            # Its headers did fit: the file has changed.
            log.warning("adapter cannot be used", adapter=id, model=model_id, why=one_line(error))
            return adapter_unusable(id, error)
        self._bytes[read.key] = size = model.resident[id].bytes_as(model.dtype)
        self._emit(AdapterLoaded(model_id, id, size, time.monotonic() - read.began))
        if id in self._withdrawn:
            self.unwanted.add(read.key)
        for key in [key for key in self._bytes if key not in in_use and key != read.key]:
            if sum(self._bytes.values()) <= self._max_bytes:
                break
            self._evict(key)
        return None

    def _evict(self, key: Key) -> None:
        model_id, id = key
        del self._bytes[key]
        self.unwanted.discard(key)
        self._models[model_id].remove(id)
        self._emit(AdapterEvicted(model_id, id))
