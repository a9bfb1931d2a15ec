"""Writes what dispatch and rpc tell into the metrics: the observer of both."""

from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version

from darkroom_server.core.events import MemoryReport
from darkroom_server.rpc.summary import RequestSummary
from darkroom_server.telemetry.metrics import Metrics


class Recorder:
    """Implements ``dispatch.Observer``, and rpc's ``RequestObserver`` and ``CallObserver``."""

    def __init__(self, metrics: Metrics, model_ids: Iterable[str]) -> None:
        self._metrics = metrics
        metrics.build.info({"version": version("darkroom-server"), "grpcio": version("grpcio")})
        metrics.ready.set(0)
        for model in model_ids:  # So that dashboards see zeros before the first job.
            self.jobs(model, queued=0, running=0)

    def ready(self, ready: bool) -> None:
        """New jobs are accepted from now on, or no longer."""
        self._metrics.ready.set(ready)

    def jobs(self, model: str, queued: int, running: int) -> None:
        """So many jobs of ``model`` wait, and so many are in the engine."""
        self._metrics.queue_depth.labels(model).set(queued)
        self._metrics.jobs_running.labels(model).set(running)

    def pass_done(self, model: str, rows: int, seconds: float) -> None:
        """One pass through the denoiser of ``model`` is done."""
        self._metrics.pass_rows.labels(model).observe(rows)
        self._metrics.pass_seconds.labels(model).observe(seconds)

    def memory(self, report: MemoryReport) -> None:
        """The engine's memory, about once a second."""
        for kind, size in report.by_kind.items():
            self._metrics.gpu_memory.labels(report.device, kind).set(size)
        self._metrics.host_memory.labels("engine").set(report.host_rss)

    def replayed(self, model: str) -> None:
        """A job of ``model`` is run again, because its engine died."""
        self._metrics.replays.labels(model).inc()

    def engine_restarted(self) -> None:
        """An engine that died is started again."""
        self._metrics.engine_restarts.inc()

    def request_ended(self, summary: RequestSummary) -> None:
        """One ``Generate`` call ended."""
        model, outcome = summary.model, summary.outcome.value
        self._metrics.request_seconds.labels(model, outcome).observe(summary.seconds)
        if images := summary.images - summary.flagged:
            self._metrics.images.labels(model, outcome).inc(images)
        if summary.flagged:
            self._metrics.images.labels(model, "flagged").inc(summary.flagged)
        if summary.stages is not None:
            for stage, seconds in asdict(summary.stages).items():
                self._metrics.stage_seconds.labels(model, stage).observe(seconds)

    def call_started(self, service: str, method: str, kind: str) -> None:
        """A call begins."""
        self._metrics.grpc_started.labels(kind, service, method).inc()

    def call_handled(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """A call ended."""
        self._metrics.grpc_handled.labels(kind, service, method, code).inc()
        self._metrics.grpc_handling.labels(kind, service, method).observe(seconds)
