"""Metrics of requests and jobs: duration, stages, outcomes."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from darkroom_server.core.errors import Reason
from darkroom_server.core.events import StageSeconds
from darkroom_server.dispatch import (
    Dispatcher,
    EstimateChecked,
    FirstPreview,
    JobEnded,
    JobOutcome,
    JobRerun,
    ReadyChanged,
    RetryJoined,
)
from darkroom_server.service.summary import UNKNOWN_MODEL, Outcome, RequestSummary
from darkroom_server.telemetry.metrics.catalogue import Catalogue

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: about one for a demo image, minutes for a large one on a busy server."""

STAGE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
"""Seconds: prompts take milliseconds, denoising up to minutes."""

ERROR_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Actual over estimated time; 1 is an exact estimate."""

REJECTIONS = (
    Reason.INVALID_REQUEST,
    Reason.MODEL_LOADING,
    Reason.DRAINING,
    Reason.DOES_NOT_FIT,
    Reason.QUEUE_FULL,
    Reason.LEDGER_UNREACHABLE,
    Reason.QUOTA_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE,
)

UNAUTHORIZED = (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)
"""Reasons of calls of any method: their model is unknown."""

STAGES = [stage.name for stage in fields(StageSeconds)]


class RequestMetrics:
    """One attribute per metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.ready = declare.gauge(
            "darkroom_ready", "1 while jobs are accepted and an engine can run them."
        )
        self.seconds = declare.histogram(
            "darkroom_request_seconds",
            "Seconds from a request's arrival to its answer, by outcome.",
            ("model", "outcome"),
            REQUEST_BUCKETS,
        )
        self.stage_seconds = declare.histogram(
            "darkroom_stage_seconds",
            "Seconds of finished requests by stage; queue, encode_prompt, denoise, decode and "
            "encode_image add up to the whole.",
            ("model", "stage"),
            STAGE_BUCKETS,
        )
        self.first_preview_seconds = declare.histogram(
            "darkroom_time_to_first_preview_seconds",
            "Seconds from a request's arrival to the first preview of one of its images.",
            ("model",),
            REQUEST_BUCKETS,
        )
        self.estimate_error = declare.histogram(
            "darkroom_estimate_error_ratio",
            "Actual seconds of finished jobs, divided by the estimate at admission.",
            ("model",),
            ERROR_BUCKETS,
        )
        self.deadline_misses = declare.counter(
            "darkroom_deadline_misses_total",
            "Requests that missed their deadline, or could not meet it, by phase: admission, "
            "queue, denoise or decode.",
            ("model", "phase"),
        )
        self.images = declare.counter(
            "darkroom_images_total",
            "Requested images by the outcome of their request; `flagged` images were withheld.",
            ("model", "outcome"),
        )
        self.queue_depth = declare.gauge(
            "darkroom_queue_depth", "Jobs that wait for a place in an engine.", ("model",)
        )
        self.jobs_running = declare.gauge("darkroom_jobs_running", "Jobs in an engine.", ("model",))
        self.backlog_seconds = declare.gauge(
            "darkroom_backlog_seconds",
            "Estimated seconds until the jobs that wait or run now have finished.",
            ("model",),
        )
        self.rejections = declare.counter(
            "darkroom_rejections_total",
            "Requests that were rejected before they became a job, and unauthorized calls of any "
            "method, by the reason in the error.",
            ("model", "reason"),
        )
        self.cancels = declare.counter(
            "darkroom_cancels_total",
            "Jobs cancelled by their callers, by phase: queue, denoise or decode.",
            ("model", "phase"),
        )
        self.retries_joined = declare.counter(
            "darkroom_retries_joined_total",
            "Repeated requests that joined the job of an earlier request.",
            ("model",),
        )
        self.replays = declare.counter(
            "darkroom_job_replays_total",
            "Jobs that ran again because their engine died.",
            ("model",),
        )
        self.ready.set(0)
        for reason in UNAUTHORIZED:
            self.rejections.labels(UNKNOWN_MODEL, reason.lower())
        self.handlers: dict[type, Callable[[Any], None]] = {
            ReadyChanged: lambda event: self.ready.set(event.ready),
            JobEnded: self.record_end,
            JobRerun: lambda event: self.replays.labels(event.model).inc(),
            RetryJoined: lambda event: self.retries_joined.labels(event.model).inc(),
            FirstPreview: self.record_preview,
            EstimateChecked: self.record_estimate,
        }

    def begin(self, model: str) -> None:
        """Create the series of ``model`` at zero, so that rates see the first increase too."""
        for phase in ("queue", "denoise", "decode"):
            self.cancels.labels(model, phase)
            self.deadline_misses.labels(model, phase)
        self.deadline_misses.labels(model, "admission")
        self.retries_joined.labels(model)
        self.replays.labels(model)
        for stage in STAGES:
            self.stage_seconds.labels(model, stage)
        for outcome in Outcome:
            self.seconds.labels(model, outcome.value)
            self.images.labels(model, outcome.value)
        self.images.labels(model, "flagged")
        for reason in REJECTIONS:
            self.rejections.labels(model, reason.lower())

    def read_jobs(self, model: str, dispatcher: Dispatcher) -> None:
        """Read the waiting and the running jobs of ``model``, and their seconds, at each scrape."""
        self.queue_depth.labels(model).set_function(lambda: dispatcher.job_counts(model)[0])
        self.jobs_running.labels(model).set_function(lambda: dispatcher.job_counts(model)[1])
        self.backlog_seconds.labels(model).set_function(lambda: dispatcher.backlog.seconds(model))

    def record_end(self, ended: JobEnded) -> None:
        """An accepted job ended."""
        if ended.outcome is JobOutcome.CANCELLED:
            self.cancels.labels(ended.model, ended.phase).inc()
        elif ended.outcome is JobOutcome.EXPIRED:
            self.deadline_misses.labels(ended.model, ended.phase).inc()

    def record_preview(self, preview: FirstPreview) -> None:
        """The first preview of a job exists."""
        self.first_preview_seconds.labels(preview.model).observe(preview.seconds)

    def record_estimate(self, checked: EstimateChecked) -> None:
        """A job with an estimate finished."""
        if checked.estimate > 0:
            ratio = checked.seconds / checked.estimate
            self.estimate_error.labels(checked.model).observe(ratio)

    def request_ended(self, summary: RequestSummary) -> None:
        """A request ended."""
        model, outcome = summary.model, summary.outcome.value
        exemplar = {"trace_id": summary.trace.trace_id} if summary.trace else None
        self.seconds.labels(model, outcome).observe(summary.seconds, exemplar)
        if images := summary.images - summary.flagged:
            self.images.labels(model, outcome).inc(images)
        if summary.flagged:
            self.images.labels(model, "flagged").inc(summary.flagged)
        if summary.stages is not None:
            for stage, seconds in asdict(summary.stages).items():
                self.stage_seconds.labels(model, stage).observe(seconds)
        if summary.reason == Reason.DEADLINE_UNREACHABLE:
            self.deadline_misses.labels(model, "admission").inc()
        if summary.outcome in (Outcome.INVALID, Outcome.REFUSED):
            self.rejections.labels(model, summary.reason.lower()).inc()

    def call_rejected(self, reason: Reason) -> None:
        """A call was rejected before its handler ran."""
        self.rejections.labels(UNKNOWN_MODEL, reason.lower()).inc()
