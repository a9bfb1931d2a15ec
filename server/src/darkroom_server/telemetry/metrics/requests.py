"""Requests and jobs: how long they took, where the time went, how they ended."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: a demo picture takes about one, a large one on a busy server minutes."""

STAGE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
"""Seconds: prompts take milliseconds, denoising up to minutes."""

ERROR_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""A ratio: 1 is an estimate that came true."""


class RequestMetrics:
    """One attribute for each metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.ready = declare.gauge(
            "darkroom_ready", "1 while jobs are accepted and an engine can draw them."
        )
        self.seconds = declare.histogram(
            "darkroom_request_seconds",
            "From a request's arrival to its answer, by how it ended.",
            ("model", "outcome"),
            REQUEST_BUCKETS,
        )
        self.stage_seconds = declare.histogram(
            "darkroom_stage_seconds",
            "Where the time of finished requests went: queue, encode_prompt, denoise, decode and "
            "encode_image add up to it.",
            ("model", "stage"),
            STAGE_BUCKETS,
        )
        self.first_preview_seconds = declare.histogram(
            "darkroom_time_to_first_preview_seconds",
            "From a request's arrival to the first preview of one of its images.",
            ("model",),
            REQUEST_BUCKETS,
        )
        self.estimate_error = declare.histogram(
            "darkroom_estimate_error_ratio",
            "Seconds that finished jobs took, over those estimated at their admission.",
            ("model",),
            ERROR_BUCKETS,
        )
        self.deadline_misses = declare.counter(
            "darkroom_deadline_misses_total",
            "Requests whose deadline could not be met, or was not, by how far they had come: "
            "admission, queue, denoise or decode.",
            ("model", "phase"),
        )
        self.images = declare.counter(
            "darkroom_images_total",
            "Images asked for, by how their request ended; flagged ones were withheld.",
            ("model", "outcome"),
        )
        self.queue_depth = declare.gauge(
            "darkroom_queue_depth", "Jobs that wait for a place in the engine.", ("model",)
        )
        self.jobs_running = declare.gauge(
            "darkroom_jobs_running", "Jobs in the engine.", ("model",)
        )
        self.rejections = declare.counter(
            "darkroom_rejections_total",
            "Requests that no job came of, and calls of any method without a token that allows "
            "them, by the reason that the caller was told.",
            ("model", "reason"),
        )
        self.cancels = declare.counter(
            "darkroom_cancels_total",
            "Jobs given up by their callers, by how far they had come: queue, denoise or decode.",
            ("model", "phase"),
        )
        self.retries_joined = declare.counter(
            "darkroom_retries_joined_total",
            "Requests that came again, and joined the job that the first one began.",
            ("model",),
        )
        self.replays = declare.counter(
            "darkroom_job_replays_total",
            "Jobs that were run again because their engine died.",
            ("model",),
        )
