"""The engine: its passes, what it wasted, what went wrong in it, how it came up."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue

STEP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Seconds of one step: milliseconds on a large GPU, up to seconds for large images on a CPU."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)

OCCUPANCY_BUCKETS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

ROWS_HELP = "`rows` is the next power of two"


class EngineMetrics:
    """One attribute for each metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.build = declare.info(
            "darkroom_build", "Versions of what is running.", ("version", "grpcio", "python")
        )
        self.step_seconds = declare.histogram(
            "darkroom_step_seconds",
            "Seconds of one step, which is one pass of the denoiser and the schedulers' updates, "
            f"until the device has finished it; {ROWS_HELP}.",
            ("model", "rows"),
            STEP_BUCKETS,
        )
        self.steps = declare.counter(
            "darkroom_steps_total",
            "Steps taken by images: a pass is one for each image in it.",
            ("model",),
        )
        self.rows_per_step = declare.histogram(
            "darkroom_rows_per_step",
            "Rows of a pass; an image with guidance takes two.",
            ("model",),
            ROW_BUCKETS,
        )
        self.occupancy = declare.histogram(
            "darkroom_occupancy_ratio",
            "Rows of a pass, over those that it could have held.",
            ("model",),
            OCCUPANCY_BUCKETS,
        )
        self.joins = declare.counter(
            "darkroom_joins_total",
            "Images that took their first step in the company of others already under way.",
            ("model",),
        )
        self.wasted_seconds = declare.counter(
            "darkroom_wasted_engine_seconds_total",
            "Seconds of passes spent on jobs that were later cancelled or expired, each pass "
            "shared among its rows.",
            ("model",),
        )
        self.out_of_memory = declare.counter(
            "darkroom_out_of_memory_total",
            "Passes, decodes and encodings of prompts that ran out of memory: split ones were "
            "tried again in halves, failed ones were of a single image or job.",
            ("model", "outcome"),
        )
        self.non_finite = declare.counter(
            "darkroom_non_finite_decodes_total",
            "Decodes whose values were not numbers: recovered in float32, or failed.",
            ("model", "outcome"),
        )
        self.truncations = declare.counter(
            "darkroom_prompt_truncations_total",
            "Jobs of whose prompt the model read the beginning only.",
            ("model",),
        )
        self.prompt_lookups = declare.counter(
            "darkroom_prompt_lookups_total",
            "Prompts that were wanted as embeddings: a hit was remembered, a miss was encoded.",
            ("model", "result"),
        )
        self.restarts = declare.counter(
            "darkroom_engine_restarts_total", "Engines that were started again after they died."
        )
        self.given_up = declare.gauge(
            "darkroom_engines_given_up",
            "Engines that never loaded, or died too often, and that the others do without.",
        )
        self.load_seconds = declare.gauge(
            "darkroom_model_load_seconds",
            "Seconds that the model took, the last time, from its files into memory.",
            ("model",),
        )
        self.warm_up_seconds = declare.gauge(
            "darkroom_model_warm_up_seconds",
            "Seconds that the model took, the last time, to be arranged, warmed up and measured.",
            ("model",),
        )
