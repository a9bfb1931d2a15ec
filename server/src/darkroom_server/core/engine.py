"""The engine as the rest of the server sees it."""

from collections.abc import Callable
from typing import Protocol

from darkroom_server.core.events import Event
from darkroom_server.core.job import Job


class Engine(Protocol):
    """Draws the images of jobs, somewhere else than on the caller's thread.

    No method blocks on the model. Whatever becomes of the engine is told as an event, through the
    callback given to ``start``, from a thread of the engine's own and in order.
    """

    def start(self, emit: Callable[[Event], None]) -> None:
        """Begin to load; ``EngineReady`` or ``EngineDied`` follows."""

    def submit(self, job: Job) -> None:
        """Take a job; its end follows as an event. Legal once ``EngineReady`` was told."""

    def cancel(self, job_id: str) -> None:
        """Drop a job at the next step boundary; unknown and ended jobs are ignored."""

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Give a job until ``deadline`` instead; unknown and ended jobs are ignored."""

    def close(self) -> None:
        """Stop, and free what the engine holds; blocks until it has. Jobs end without an event."""
