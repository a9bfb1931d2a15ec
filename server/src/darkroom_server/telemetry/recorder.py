"""Writes what dispatch and rpc tell into the metrics: the observer of both."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from importlib.metadata import version

from darkroom_server.core.errors import Reason
from darkroom_server.core.events import (
    BatchDone,
    Counted,
    EngineCounts,
    EngineReady,
    MemoryReport,
    PeakMeasured,
    StageSeconds,
)
from darkroom_server.core.metric_labels import rows_class, size_class
from darkroom_server.rpc.summary import UNKNOWN_MODEL, Outcome, RequestSummary
from darkroom_server.telemetry.batch_metrics import BatchMetrics
from darkroom_server.telemetry.metrics import Metrics

REJECTIONS = (
    Reason.INVALID_REQUEST,
    Reason.MODEL_LOADING,
    Reason.DRAINING,
    Reason.DOES_NOT_FIT,
    Reason.QUEUE_FULL,
    Reason.QUOTA_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE,
)

NOT_LET_IN = (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)
"""Whatever call it was: of these, no model is known."""

STAGES = [stage.name for stage in fields(StageSeconds)]


class Recorder:
    """Implements ``dispatch.Observer``, and rpc's ``Observer``.

    ``on_request`` is told of each request too, once it is counted.
    """

    def __init__(
        self,
        metrics: Metrics,
        model_ids: Iterable[str],
        on_request: Callable[[RequestSummary], None] = lambda _: None,
    ) -> None:
        self._on_request = on_request
        self._calls = metrics.calls
        self._requests = metrics.requests
        self._engine = engine = metrics.engine
        self._memory = metrics.memory
        self._batch_metrics: dict[tuple[str, str], BatchMetrics] = {}
        # Of each model and rows or size: the most so far.
        self._peaks: dict[tuple[str, ...], int] = {}
        self._counters = {
            Counted.PROMPTS_CACHED: (engine.prompt_lookups, ("hit",)),
            Counted.PROMPTS_ENCODED: (engine.prompt_lookups, ("miss",)),
            Counted.PROMPTS_TRUNCATED: (engine.truncations, ()),
            Counted.OUT_OF_MEMORY_SPLIT: (engine.out_of_memory, ("split",)),
            Counted.OUT_OF_MEMORY_FAILED: (engine.out_of_memory, ("failed",)),
            Counted.NON_FINITE_RECOVERED: (engine.non_finite, ("recovered",)),
            Counted.NON_FINITE_FAILED: (engine.non_finite, ("failed",)),
        }
        engine.build.info(
            {
                "version": version("darkroom-server"),
                "grpcio": version("grpcio"),
                "python": platform.python_version(),
            }
        )
        self._requests.ready.set(0)
        for model in model_ids:
            self._begin(model)
        for reason in NOT_LET_IN:
            self._requests.rejections.labels(UNKNOWN_MODEL, reason.lower())

    def _begin(self, model: str) -> None:
        """Show zeros before the first job, so that rates see the first increase too."""
        self.jobs(model, queued=0, running=0)
        for counter, labels in self._counters.values():
            counter.labels(model, *labels)
        for phase in ("queue", "denoise", "decode"):
            self._requests.cancels.labels(model, phase)
            self._requests.deadline_misses.labels(model, phase)
        self._requests.deadline_misses.labels(model, "admission")
        for metric in (
            self._requests.retries_joined,
            self._requests.replays,
            self._engine.steps,
            self._engine.joins,
            self._engine.wasted_seconds,
            self._engine.rows_per_step,
            self._engine.occupancy,
        ):
            metric.labels(model)
        for stage in STAGES:
            self._requests.stage_seconds.labels(model, stage)
        for outcome in Outcome:
            self._requests.seconds.labels(model, outcome.value)
            self._requests.images.labels(model, outcome.value)
        self._requests.images.labels(model, "flagged")
        for reason in REJECTIONS:
            self._requests.rejections.labels(model, reason.lower())

    # What dispatch tells.

    def ready(self, ready: bool) -> None:
        """New jobs are accepted from now on, or no longer."""
        self._requests.ready.set(ready)

    def jobs(self, model: str, queued: int, running: int) -> None:
        """So many jobs of ``model`` wait, and so many are in the engine."""
        self._requests.queue_depth.labels(model).set(queued)
        self._requests.jobs_running.labels(model).set(running)

    def loaded(self, ready: EngineReady) -> None:
        """An engine has loaded its models."""
        for load in ready.loads:
            self._engine.load_seconds.labels(load.model).set(load.load_seconds)
            self._engine.warm_up_seconds.labels(load.model).set(load.warm_up_seconds)
            for component, size in load.bytes_by_component.items():
                self._memory.model.labels(load.model, component).set(size)

    def batch_done(self, done: BatchDone) -> None:
        """One pass through a denoiser is done."""
        key = done.model, rows_class(done.rows)
        series = self._batch_metrics.get(key)
        if series is None:
            # Looking series up by their labels takes longer than counting.
            series = self._batch_metrics[key] = BatchMetrics(self._engine, *key)
        series.count(done)

    def counted(self, counts: EngineCounts) -> None:
        """What an engine counted since it last told."""
        for counted, amount in counts.counts.items():
            counter, labels = self._counters[counted]
            counter.labels(counts.model, *labels).inc(amount)

    def peak(self, peak: PeakMeasured) -> None:
        """A pass or a decode was measured; the highest counts."""
        key: tuple[str, ...] = (peak.model, size_class(peak.width, peak.height))
        gauge = self._memory.decode_peak
        if peak.rows:
            key, gauge = (*key, rows_class(peak.rows)), self._memory.pass_peak
        self._peaks[key] = max(peak.peak_bytes, self._peaks.get(key, 0))
        gauge.labels(*key).set(self._peaks[key])

    def memory(self, report: MemoryReport) -> None:
        """The engine's memory, about once a second."""
        device, sensors = report.device, report.sensors
        for kind, size in report.by_kind.items():
            self._memory.device.labels(device, kind).set(size)
        self._memory.host.labels("engine", device).set(report.host_rss)
        for gauge, value in (
            (self._memory.utilisation, sensors.utilisation),
            (self._memory.power, sensors.power_watts),
            (self._memory.temperature, sensors.temperature_celsius),
        ):
            if value is not None:
                gauge.labels(device).set(value)

    def replayed(self, model: str) -> None:
        """A job of ``model`` is run again, because its engine died."""
        self._requests.replays.labels(model).inc()

    def engine_restarted(self) -> None:
        """An engine that died is started again."""
        self._engine.restarts.inc()

    def engine_given_up(self) -> None:
        """An engine is never started again; others go on."""
        self._engine.given_up.inc()

    def ended(self, model: str, end: str, phase: str) -> None:
        """An accepted job ended, in ``phase``."""
        if end == "cancelled":
            self._requests.cancels.labels(model, phase).inc()
        elif end == "expired":
            self._requests.deadline_misses.labels(model, phase).inc()

    def wasted(self, model: str, seconds: float) -> None:
        """A job left the engine unfinished, after ``seconds`` of its passes."""
        self._engine.wasted_seconds.labels(model).inc(seconds)

    def estimated(self, model: str, estimate: float, seconds: float) -> None:
        """A job that was to take ``estimate`` seconds took ``seconds``."""
        if estimate > 0:
            self._requests.estimate_error.labels(model).observe(seconds / estimate)

    def previewed(self, model: str, seconds: float) -> None:
        """The first preview of a job was there ``seconds`` after the job came."""
        self._requests.first_preview_seconds.labels(model).observe(seconds)

    def retry_joined(self, model: str) -> None:
        """A request came again, and joined the job that the first one began."""
        self._requests.retries_joined.labels(model).inc()

    # What rpc tells.

    def request_ended(self, summary: RequestSummary) -> None:
        """One request ended."""
        requests, model, outcome = self._requests, summary.model, summary.outcome.value
        exemplar = {"trace_id": summary.trace.trace_id} if summary.trace else None
        requests.seconds.labels(model, outcome).observe(summary.seconds, exemplar)
        if images := summary.images - summary.flagged:
            requests.images.labels(model, outcome).inc(images)
        if summary.flagged:
            requests.images.labels(model, "flagged").inc(summary.flagged)
        if summary.stages is not None:
            for stage, seconds in asdict(summary.stages).items():
                requests.stage_seconds.labels(model, stage).observe(seconds)
        unreachable = summary.reason == Reason.DEADLINE_UNREACHABLE
        if unreachable:
            requests.deadline_misses.labels(model, "admission").inc()
        if unreachable or summary.outcome in (Outcome.INVALID, Outcome.REFUSED):
            requests.rejections.labels(model, summary.reason.lower()).inc()
        self._on_request(summary)

    def call_refused(self, reason: Reason) -> None:
        """A call was not let in."""
        self._requests.rejections.labels(UNKNOWN_MODEL, reason.lower()).inc()

    def call_started(self, service: str, method: str, kind: str) -> None:
        """A call begins."""
        self._calls.started.labels(kind, service, method).inc()

    def call_handled(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """A call ended."""
        self._calls.handled.labels(kind, service, method, code).inc()
        self._calls.handling_seconds.labels(kind, service, method).observe(seconds)

    def message(self, service: str, method: str, kind: str, size: int, *, sent: bool) -> None:
        """A message of ``size`` bytes came, or was sent."""
        sizes = self._calls.sent_bytes if sent else self._calls.received_bytes
        sizes.labels(kind, service, method).observe(size)
