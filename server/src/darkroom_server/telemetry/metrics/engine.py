"""Metrics of the engine: batches, wasted time, failures, restarts, loading."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from darkroom_server.core.events import (
    BatchDone,
    Counted,
    DenoiserCompiled,
    EncodeDone,
    EngineCounts,
    EngineReady,
    RowLimitCorrected,
    SampleBytesCorrected,
)
from darkroom_server.core.metric_labels import rows_class
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoaded
from darkroom_server.dispatch import EngineRestarted, EngineRetired, EngineTimeWasted
from darkroom_server.telemetry.metrics.catalogue import Catalogue

STEP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Seconds of one batch: milliseconds on a large GPU, seconds for large images on a CPU."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)

ENCODE_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
"""Seconds of an encode: milliseconds for CLIP, seconds for billions of weights on a CPU."""
ADAPTER_BUCKETS = (0, 1, 2, 4, 8, 16, 32)

OCCUPANCY_BUCKETS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

ROWS_HELP = "`rows` is rounded up to a power of two"


class EngineMetrics:
    """One attribute per metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.build = declare.info(
            "darkroom_build",
            "Versions of the server and its libraries.",
            ("version", "grpcio", "python"),
        )
        self.step_seconds = declare.histogram(
            "darkroom_step_seconds",
            "Seconds of one batch: one denoiser pass and the schedulers' updates, until the device "
            f"has finished; {ROWS_HELP}.",
            ("model", "rows"),
            STEP_BUCKETS,
        )
        self.steps = declare.counter(
            "darkroom_steps_total",
            "Steps taken by images; a batch is one step for each image in it.",
            ("model",),
        )
        self.rows_per_step = declare.histogram(
            "darkroom_rows_per_step",
            "Rows of a batch; an image with guidance takes two.",
            ("model",),
            ROW_BUCKETS,
        )
        self.adapters_per_batch = declare.histogram(
            "darkroom_adapters_per_batch",
            "Different LoRA adapters among the rows of a batch; batches without any count too.",
            ("model",),
            ADAPTER_BUCKETS,
        )
        self.occupancy = declare.histogram(
            "darkroom_occupancy_ratio",
            "Rows of a batch, divided by its row limit.",
            ("model",),
            OCCUPANCY_BUCKETS,
        )
        self.joins = declare.counter(
            "darkroom_joins_total",
            "Images whose first step shared a batch with images that were already running.",
            ("model",),
        )
        self.wasted_seconds = declare.counter(
            "darkroom_wasted_engine_seconds_total",
            "Seconds of batches spent on jobs that were later cancelled or expired; the time of a "
            "batch is divided among its rows.",
            ("model",),
        )
        self.out_of_memory = declare.counter(
            "darkroom_out_of_memory_total",
            "Batches, decodes and prompt encodings that ran out of memory: `split` ran again in "
            "halves, `failed` was a single image or job.",
            ("model", "outcome"),
        )
        self.non_finite = declare.counter(
            "darkroom_non_finite_decodes_total",
            "Decodes with NaN or infinite values: `recovered` in float32, or `failed`.",
            ("model", "outcome"),
        )
        self.truncations = declare.counter(
            "darkroom_prompt_truncations_total",
            "Jobs whose prompt was longer than the tokenizer takes, and was cut.",
            ("model",),
        )
        self.prompt_lookups = declare.counter(
            "darkroom_prompt_lookups_total",
            "Lookups in the prompt cache: a `hit` was cached, a `miss` was encoded.",
            ("model", "result"),
        )
        self.encode_seconds = declare.histogram(
            "darkroom_encode_seconds",
            "Seconds of an encode of prompts that were not cached; of jobs that arrive together, "
            "some models encode the prompts together.",
            ("model",),
            ENCODE_BUCKETS,
        )
        self.prompt_cache = declare.gauge(
            "darkroom_prompt_cache_bytes",
            "Bytes of the embeddings in the prompt cache; `--prompt-cache-bytes` bounds them.",
            ("model",),
        )
        self.restarts = declare.counter(
            "darkroom_engine_restarts_total", "Engines restarted after they died."
        )
        self.retired = declare.gauge(
            "darkroom_engines_given_up",
            "Engines that failed to load or died too often, and are not restarted.",
        )
        self.max_rows = declare.gauge(
            "darkroom_max_rows",
            "Most rows of a batch of the model's default size now; real batches correct it, unless "
            "`--rows` sets it.",
            ("model",),
        )
        self.sample_bytes = declare.gauge(
            "darkroom_bytes_per_sample",
            "Bytes that an unfinished image of the default size holds between its batches, without "
            "guidance; they bound the images in an engine. Images that hold more correct it.",
            ("model",),
        )
        self.model_info = declare.gauge(
            "darkroom_model_info",
            "1 for each loaded model; its labels say how it runs. `memory_format` is the "
            "denoiser's: `contiguous` or `channels_last`.",
            ("model", "revision", "device", "dtype", "memory_format", "preset", "attention"),
        )
        self.denoiser_compiled = declare.gauge(
            "darkroom_denoiser_compiled",
            "1 if batches of the model run its compiled denoiser, else 0.",
            ("model",),
        )
        self.build.info(
            {
                "version": version("darkroom-server"),
                "grpcio": version("grpcio"),
                "python": platform.python_version(),
            }
        )
        self._counters = {
            Counted.PROMPTS_CACHED: (self.prompt_lookups, ("hit",)),
            Counted.PROMPTS_ENCODED: (self.prompt_lookups, ("miss",)),
            Counted.PROMPTS_TRUNCATED: (self.truncations, ()),
            Counted.OUT_OF_MEMORY_SPLIT: (self.out_of_memory, ("split",)),
            Counted.OUT_OF_MEMORY_FAILED: (self.out_of_memory, ("failed",)),
            Counted.NON_FINITE_RECOVERED: (self.non_finite, ("recovered",)),
            Counted.NON_FINITE_FAILED: (self.non_finite, ("failed",)),
        }
        self._batch_series: dict[tuple[str, int], _BatchSeries] = {}
        self.handlers: dict[type, Callable[[Any], None]] = {
            BatchDone: self.record_batch,
            EncodeDone: self.record_encode,
            EngineCounts: self.record_counts,
            EngineReady: self.record_load,
            ModelLoaded: lambda loaded: self.record_model(loaded.info),
            RowLimitCorrected: self.record_row_limit,
            SampleBytesCorrected: self.record_sample_bytes,
            DenoiserCompiled: self.record_compiled,
            EngineTimeWasted: self.record_wasted,
            EngineRestarted: lambda _: self.restarts.inc(),
            EngineRetired: lambda _: self.retired.inc(),
        }

    def begin(self, model: str) -> None:
        """Create the series of ``model`` at zero, so that rates see the first increase too."""
        for counter, labels in self._counters.values():
            counter.labels(model, *labels)
        for metric in (
            self.steps,
            self.joins,
            self.wasted_seconds,
            self.rows_per_step,
            self.adapters_per_batch,
            self.occupancy,
            self.encode_seconds,
            self.prompt_cache,
        ):
            metric.labels(model)

    def record_batch(self, batch: BatchDone) -> None:
        """One batch, dozens of times a second: so the series are looked up once."""
        key = batch.model, batch.rows
        series = self._batch_series.get(key)
        if series is None:
            series = self._batch_series[key] = _BatchSeries(self, *key)
        series.seconds.observe(batch.seconds)
        series.adapters.observe(batch.adapters)
        series.rows.observe(batch.rows)
        series.steps.inc(batch.samples)
        if batch.max_rows:
            series.occupancy.observe(min(1.0, batch.rows / batch.max_rows))
        if batch.joined:
            series.joins.inc(batch.joined)

    def record_encode(self, encode: EncodeDone) -> None:
        """Prompts were encoded."""
        self.encode_seconds.labels(encode.model).observe(encode.seconds)
        self.prompt_cache.labels(encode.model).set(encode.cache_bytes)

    def record_counts(self, counts: EngineCounts) -> None:
        """What an engine counted since its last report."""
        for counted, amount in counts.counts.items():
            counter, labels = self._counters[counted]
            counter.labels(counts.model, *labels).inc(amount)

    def record_load(self, ready: EngineReady) -> None:
        """An engine has loaded its models."""
        for model in ready.models:
            self.record_model(model)

    def record_model(self, model: ModelInfo) -> None:
        """A model is loaded."""
        self.max_rows.labels(model.id).set(model.limits.max_rows)
        self.sample_bytes.labels(model.id).set(model.memory.bytes_per_sample)
        runtime = model.runtime
        self.denoiser_compiled.labels(model.id).set(runtime.denoiser.is_compiled)
        self.model_info.labels(
            model.id,
            model.revision,
            runtime.device,
            runtime.dtype,
            runtime.memory_format,
            runtime.preset,
            runtime.attention,
        ).set(1)

    def record_row_limit(self, corrected: RowLimitCorrected) -> None:
        """Real batches have corrected the row limit of a model."""
        self.max_rows.labels(corrected.model).set(corrected.max_rows)

    def record_sample_bytes(self, corrected: SampleBytesCorrected) -> None:
        """An unfinished image held more than was measured."""
        self.sample_bytes.labels(corrected.model).set(corrected.bytes_per_sample)

    def record_compiled(self, compiled: DenoiserCompiled) -> None:
        """The denoiser of a model was compiled."""
        self.denoiser_compiled.labels(compiled.model).set(1)

    def record_wasted(self, wasted: EngineTimeWasted) -> None:
        """A job left the engine unfinished."""
        self.wasted_seconds.labels(wasted.model).inc(wasted.seconds)


class _BatchSeries:
    """The series of one model and row count."""

    def __init__(self, engine: EngineMetrics, model: str, rows: int) -> None:
        self.seconds = engine.step_seconds.labels(model, rows_class(rows))
        self.rows = engine.rows_per_step.labels(model)
        self.adapters = engine.adapters_per_batch.labels(model)
        self.steps = engine.steps.labels(model)
        self.occupancy = engine.occupancy.labels(model)
        self.joins = engine.joins.labels(model)
