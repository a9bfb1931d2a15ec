"""Metrics of requests and jobs: duration, stages, outcomes."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: about one for a demo image, minutes for a large one on a busy server."""

STAGE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
"""Seconds: prompts take milliseconds, denoising up to minutes."""

ERROR_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Actual over estimated time; 1 is an exact estimate."""


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
