"""The engine protocol: what the rest of the server needs from a backend."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from darkroom_server.core.engine_config import AdapterSource, ModelSource
from darkroom_server.core.events import Event
from darkroom_server.core.job import Job


class Engine(Protocol):
    """Generates the images of jobs, on another thread or in another process.

    No method but ``close`` blocks on the model. The engine emits events in order through the
    callback that ``start`` gets, from a thread of its own.
    """

    def start(self, emit: Callable[[Event], None]) -> None:
        """Start to load; ``EngineReady`` or ``EngineDied`` follows."""

    def submit(self, job: Job) -> None:
        """Run a job, whose end follows as an event; allowed after ``EngineReady``."""

    def cancel(self, job_id: str) -> None:
        """Cancel a job at the next step boundary; unknown and ended jobs are ignored."""

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Replace a job's deadline; unknown and ended jobs are ignored."""

    def check_adapter(self, source: AdapterSource) -> None:
        """Find the models that an adapter fits; ``AdapterChecked`` follows if the engine runs."""

    def offer_adapter(self, source: AdapterSource) -> None:
        """Let later jobs use an adapter, also after a restart."""

    def withdraw_adapter(self, id: str) -> None:
        """Free an adapter's memory once no job uses it. A job that comes later may still."""

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        """Load a model of the catalogue while jobs run; one load at a time.

        ``keep``: the host's memory holds its weights too, if it is not the device's.
        ``ModelLoaded`` or ``ModelNotLoaded`` follows if the engine lives. ``host_only``: its
        weights are read into the host's memory only, beside a load of another model; one such read
        at a time. ``ModelInHost`` or ``ModelNotLoaded`` follows.
        """

    def unload_model(self, id: str, *, keep: bool = False) -> None:
        """Free a model's memory once no job uses it; ``ModelUnloaded`` follows.

        ``keep``: its weights stay in the host's memory, for a later load. Without it they are
        freed there too.
        """

    def describe_models(self, sources: Sequence[ModelSource]) -> None:
        """Add models to the catalogue, in place of those of the same ids, also after a restart.

        ``ModelsDescribed`` follows if the engine lives.
        """

    def forget_models(self, ids: Collection[str]) -> None:
        """Remove models from the catalogue that are not in memory."""

    def close(self) -> None:
        """Stop and free all resources; blocks until done. Jobs end without an event."""
