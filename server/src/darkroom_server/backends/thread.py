"""The thread backend: the engine on a thread of this process, for debugging and tests."""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import structlog

from darkroom_server.core.engine_config import AdapterSource, EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineDied, Event
from darkroom_server.core.job import Job
from darkroom_server.ipc.commands import (
    CheckAdapter,
    DescribeModels,
    LoadModel,
    OfferAdapter,
    UnloadModel,
    WithdrawAdapter,
)

if TYPE_CHECKING:
    from darkroom_server.engine.loop import EngineLoop

log = structlog.get_logger(__name__)


class ThreadEngine:
    """Runs the loop on one thread, which is the only thread that calls torch.

    A second such thread would slow down every call on a CPU: OpenMP keeps a pool for each thread.

    Whether OpenMP's threads spin or sleep is for the program to decide that this engine is a part
    of: ``Spinning`` counts how long any thread of the process waits, and its rule holds for all
    uses of OpenMP in it. A program whose process does little besides may call ``Spinning.start``
    once torch is imported, as the engine's own process does.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._was_ready = False
        self._failed_restarts = 0
        self._loop: EngineLoop | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._emit: Callable[[Event], None] = lambda _: None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Start to load; ``EngineReady`` or ``EngineDied`` follows."""
        self._emit = emit
        self._config = self._config.after_failed_restarts(self._failed_restarts)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run a job; allowed after ``EngineReady``."""
        if self._loop is None:
            raise RuntimeError("the engine is not ready")
        self._loop.submit(job)

    def cancel(self, job_id: str) -> None:
        """Cancel a job at the next step boundary."""
        if self._loop is not None:
            self._loop.cancel(job_id)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Replace a job's deadline."""
        if self._loop is not None:
            self._loop.extend(job_id, deadline)

    def check_adapter(self, source: AdapterSource) -> None:
        """Find the models that an adapter fits; ``AdapterChecked`` follows if the engine runs."""
        if self._loop is not None:
            self._loop.change_adapters(CheckAdapter(source))

    def offer_adapter(self, source: AdapterSource) -> None:
        """Let later jobs use an adapter, also after a restart."""
        self._config = self._config.with_adapter(source)
        if self._loop is not None:
            self._loop.change_adapters(OfferAdapter(source))

    def withdraw_adapter(self, id: str) -> None:
        """Free an adapter's memory once no job uses it. A job that comes later may still."""
        self._config = self._config.without_adapter(id)
        if self._loop is not None:
            self._loop.change_adapters(WithdrawAdapter(id))

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        """Load a model of the catalogue while jobs run, or read it into the host's memory."""
        if self._loop is not None:
            source, adapters = self._config.source_of(id), self._config.adapters
            self._loop.change_models(LoadModel(source, adapters, keep=keep, host_only=host_only))

    def unload_model(self, id: str, *, keep: bool = False) -> None:
        """Free a model's memory once no job uses it."""
        if self._loop is not None:
            self._loop.change_models(UnloadModel(id, keep))

    def describe_models(self, sources: Sequence[ModelSource]) -> None:
        """Add models to the catalogue."""
        self._config = self._config.with_models(sources)
        if self._loop is not None:
            command = DescribeModels(tuple(sources), self._config.adapters)
            self._loop.change_models(command)

    def forget_models(self, ids: Collection[str]) -> None:
        """Remove models from the catalogue that are not in memory."""
        self._config = self._config.without_models(ids)

    def close(self) -> None:
        """Stop, and block until the current batch, or a load in progress, has finished."""
        self._closed.set()
        if self._loop is not None:
            self._loop.close()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # Imported here: torch takes seconds, and the server must start without it.
        from darkroom_server.engine.loading.startup import start_loop

        loading = self._config
        # It has failed until it has loaded.
        self._failed_restarts += self._was_ready
        try:
            loop, ready = start_loop(loading, self._emit)
        except StartupError as error:
            self._emit(EngineDied(str(error), fatal=True))
            return
        except Exception:
            log.exception("engine failed to start")
            self._emit(EngineDied("the engine failed to start; the log above says why"))
            return
        self._loop = loop
        self._was_ready, self._failed_restarts = True, 0
        for source in self._config.adapters:
            # What was offered while it loaded. After the line above: later ones go to the loop.
            if not source.withdrawn and source not in loading.adapters:
                loop.change_adapters(OfferAdapter(source))
        known = (*loading.catalogue, *loading.models)
        if new := tuple(each for each in self._config.catalogue if each not in known):
            loop.change_models(DescribeModels(new, self._config.adapters))
        if self._closed.is_set():
            return
        self._emit(ready)
        try:
            loop.run()
        except Exception:
            log.exception("engine died")
            self._emit(EngineDied("the engine died; the log above says why"))
