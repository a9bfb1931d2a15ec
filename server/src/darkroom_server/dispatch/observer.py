"""What the dispatcher tells whoever counts; implemented by ``telemetry``."""

from typing import Protocol

from darkroom_server.core.events import (
    BatchDone,
    EngineCounts,
    EngineReady,
    MemoryReport,
    PeakMeasured,
)


class Observer(Protocol):
    """Is told of changes, on the event loop; its methods return at once and never raise."""

    def ready(self, ready: bool) -> None:
        """New jobs are accepted from now on, or no longer."""

    def jobs(self, model: str, queued: int, running: int) -> None:
        """So many jobs of ``model`` wait, and so many are in the engine."""

    def loaded(self, ready: EngineReady) -> None:
        """An engine has loaded its models."""

    def batch_done(self, done: BatchDone) -> None:
        """One pass through a denoiser is done."""

    def counted(self, counts: EngineCounts) -> None:
        """What an engine counted since it last told."""

    def peak(self, peak: PeakMeasured) -> None:
        """A pass or a decode was measured."""

    def memory(self, report: MemoryReport) -> None:
        """The engine's memory, about once a second."""

    def replayed(self, model: str) -> None:
        """A job of ``model`` is run again, because its engine died."""

    def engine_restarted(self) -> None:
        """An engine that died is started again."""

    def engine_given_up(self) -> None:
        """An engine is never started again; others go on."""

    def ended(self, model: str, end: str, phase: str) -> None:
        """An accepted job of ``model`` ended, as ``JobOutcome`` says, in ``ActiveJob.phase``."""

    def wasted(self, model: str, seconds: float) -> None:
        """A job of ``model`` left the engine unfinished, after ``seconds`` of its passes."""

    def estimated(self, model: str, estimate: float, seconds: float) -> None:
        """A job of ``model`` that was to take ``estimate`` seconds took ``seconds``."""

    def previewed(self, model: str, seconds: float) -> None:
        """The first preview of a job was there ``seconds`` after the job came."""

    def retry_joined(self, model: str) -> None:
        """A request came again, and joined the job that the first one began."""


class NullObserver:
    """An observer that looks away."""

    def ready(self, ready: bool) -> None:
        """Ignore it."""

    def jobs(self, model: str, queued: int, running: int) -> None:
        """Ignore it."""

    def loaded(self, ready: EngineReady) -> None:
        """Ignore it."""

    def batch_done(self, done: BatchDone) -> None:
        """Ignore it."""

    def counted(self, counts: EngineCounts) -> None:
        """Ignore it."""

    def peak(self, peak: PeakMeasured) -> None:
        """Ignore it."""

    def memory(self, report: MemoryReport) -> None:
        """Ignore it."""

    def replayed(self, model: str) -> None:
        """Ignore it."""

    def engine_restarted(self) -> None:
        """Ignore it."""

    def engine_given_up(self) -> None:
        """Ignore it."""

    def ended(self, model: str, end: str, phase: str) -> None:
        """Ignore it."""

    def wasted(self, model: str, seconds: float) -> None:
        """Ignore it."""

    def estimated(self, model: str, estimate: float, seconds: float) -> None:
        """Ignore it."""

    def previewed(self, model: str, seconds: float) -> None:
        """Ignore it."""

    def retry_joined(self, model: str) -> None:
        """Ignore it."""
