"""What the dispatcher tells whoever counts; implemented by ``telemetry``."""

from typing import Protocol

from darkroom_server.core.events import MemoryReport


class Observer(Protocol):
    """Is told of changes, on the event loop; its methods return at once and never raise."""

    def ready(self, ready: bool) -> None:
        """New jobs are accepted from now on, or no longer."""

    def jobs(self, model: str, queued: int, running: int) -> None:
        """So many jobs of ``model`` wait, and so many are in the engine."""

    def pass_done(self, model: str, rows: int, seconds: float) -> None:
        """One pass through the denoiser of ``model`` is done."""

    def memory(self, report: MemoryReport) -> None:
        """The engine's memory, about once a second."""

    def replayed(self, model: str) -> None:
        """A job of ``model`` is run again, because its engine died."""

    def engine_restarted(self) -> None:
        """An engine that died is started again."""


class Unobserved:
    """An observer that looks away."""

    def ready(self, ready: bool) -> None:
        """Ignore it."""

    def jobs(self, model: str, queued: int, running: int) -> None:
        """Ignore it."""

    def pass_done(self, model: str, rows: int, seconds: float) -> None:
        """Ignore it."""

    def memory(self, report: MemoryReport) -> None:
        """Ignore it."""

    def replayed(self, model: str) -> None:
        """Ignore it."""

    def engine_restarted(self) -> None:
        """Ignore it."""
