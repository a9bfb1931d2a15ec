"""Every metric of the server: name, help, labels and buckets, on a registry of its own.

Labels are bounded: models that the server holds ("unknown" for what is none), outcomes, stages,
gRPC's methods and codes. Never a prompt, a seed or anything else that a caller wrote.
"""

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)

# They would double the series, and only OpenMetrics scrapers have a use for them.
disable_created_metrics()  # type: ignore[no-untyped-call]

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: a demo picture takes about one, a large one on a busy server minutes."""

STAGE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
"""Seconds: prompts take milliseconds, denoising up to minutes."""

PASS_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds of one denoiser pass."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)

GRPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """The metrics, one attribute each, and the ``registry`` that holds them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.build = Info("darkroom_build", "Versions of what is running.", registry=registry)
        self.ready = Gauge("darkroom_ready", "1 while new jobs are accepted.", registry=registry)
        self.grpc_started = Counter(
            "grpc_server_started_total", "Calls begun.", GRPC_LABELS, registry=registry
        )
        self.grpc_handled = Counter(
            "grpc_server_handled_total",
            "Calls ended, by status code.",
            (*GRPC_LABELS, "grpc_code"),
            registry=registry,
        )
        self.grpc_handling = Histogram(
            "grpc_server_handling_seconds",
            "From the beginning of a call to its end.",
            GRPC_LABELS,
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "darkroom_request_seconds",
            "From a request's arrival to its answer, by how it ended.",
            ("model", "outcome"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "darkroom_stage_seconds",
            "Where the time of finished requests went.",
            ("model", "stage"),
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.images = Counter(
            "darkroom_images_total",
            "Images asked for, by how their request ended; flagged ones were withheld.",
            ("model", "outcome"),
            registry=registry,
        )
        self.queue_depth = Gauge(
            "darkroom_queue_depth",
            "Jobs that wait for a place in the engine.",
            ("model",),
            registry=registry,
        )
        self.jobs_running = Gauge(
            "darkroom_jobs_running", "Jobs in the engine.", ("model",), registry=registry
        )
        self.pass_rows = Histogram(
            "darkroom_rows_per_pass",
            "Rows of a denoiser pass; an image with guidance takes two.",
            ("model",),
            buckets=ROW_BUCKETS,
            registry=registry,
        )
        self.pass_seconds = Histogram(
            "darkroom_pass_seconds",
            "Seconds of a denoiser pass: one step for every image in it.",
            ("model",),
            buckets=PASS_BUCKETS,
            registry=registry,
        )
        self.replays = Counter(
            "darkroom_job_replays_total",
            "Jobs that were run again because their engine died.",
            ("model",),
            registry=registry,
        )
        self.engine_restarts = Counter(
            "darkroom_engine_restarts_total",
            "Engines that were started again after they died.",
            registry=registry,
        )
        self.gpu_memory = Gauge(
            "darkroom_gpu_memory_bytes",
            "Memory of the engine's device, by kind.",
            ("device", "kind"),
            registry=registry,
        )
        self.host_memory = Gauge(
            "darkroom_host_memory_bytes",
            "Resident memory of each process of the server.",
            ("process",),
            registry=registry,
        )
        # Read when Prometheus asks, so that nothing need poll it.
        own = psutil.Process()
        self.host_memory.labels(process="server").set_function(lambda: own.memory_info().rss)
