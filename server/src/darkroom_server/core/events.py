"""The engine's events: plain data, in the order in which they happened.

Every job that was submitted ends in exactly one of ``JobFinished``, ``JobFailed`` and
``JobCancelled``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.catalog import ModelDescription
from darkroom_server.core.errors import Failure
from darkroom_server.core.job import ImageFormat
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import (
    ModelFetching,
    ModelInHost,
    ModelLoad,
    ModelLoaded,
    ModelNotLoaded,
    ModelsDescribed,
    ModelUnloaded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the engine adds to a job's fields to reproduce one of its images.

    ``memory_fallbacks``: what it did otherwise than the model's runtime says, as memory was short.
    """

    scheduler_class: str
    scheduler_config_json: str
    device: str
    library_versions: dict[str, str]
    rows_in_last_pass: int
    pixels_sha256: str
    memory_fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFields:
    """What is known of a finished image beside its file."""

    format: ImageFormat
    width: int
    height: int
    seed: int
    prompt_truncated: bool
    flagged: bool
    replay: Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage(ImageFields):
    """One finished image; ``data`` is empty if the safety checker withheld it."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """The seconds of a job's stages. The stages of several images overlap."""

    queue: float = 0.0
    encode_prompt: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode_image: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Every model that is loaded at the start is loaded and warmed up.

    ``descriptions`` are those of the rest of the catalogue. ``free_bytes``: what the device has
    left for weights and batches, None if that is not known. ``host_free_bytes``: what the host has
    left for weights; None if it is the device's own memory. ``device`` is its name.
    """

    models: tuple[ModelInfo, ...]
    load_seconds: float
    loads: tuple[ModelLoad, ...] = ()
    descriptions: tuple[ModelDescription, ...] = ()
    free_bytes: int | None = None
    host_free_bytes: int | None = None
    device: str = ""


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine has stopped; ``message`` is one line for the operator.

    ``fatal``: a restart with the same configuration would fail in the same way. ``exhausted``: it
    could not start because the machine had no descriptors, processes or memory to give.
    """

    message: str
    fatal: bool = False
    exhausted: bool = False


@dataclass(frozen=True, slots=True)
class JobTaken:
    """The engine starts to encode the prompts of a job."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The first batch with a sample of the job begins."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """One sample took a step: ``step`` of ``steps`` denoiser calls are done.

    The batch had ``rows`` rows and took ``seconds``. The steps of a batch are emitted directly
    before its ``BatchDone``, from the same thread.
    """

    job_id: str
    image_index: int
    step: int
    steps: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewReady:
    """A small preview of one sample after ``step`` of its denoiser calls."""

    job_id: str
    image_index: int
    step: int
    data: bytes
    format: ImageFormat
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """One batch of ``rows`` rows through the denoiser of ``model`` took ``seconds``.

    ``width`` × ``height`` are the pixels of its largest image; most models take only equal ones.
    Each of ``samples`` took one step; ``joined`` of them took their first in a batch with samples
    that were further. ``max_rows`` is the batch's row limit, 0 if unknown. ``ended_at`` is in
    ``time.monotonic`` seconds. ``adapters`` is the number of different adapters of its rows.
    ``control_cost``: the part of the denoiser's seconds that its ControlNets took besides.
    """

    model: str
    width: int
    height: int
    rows: int
    seconds: float
    samples: int = 0
    joined: int = 0
    max_rows: int = 0
    ended_at: float = 0.0
    adapters: int = 0
    control_cost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChecked:
    """``offers``: the adapter's offer to each model that it fits, by the model's id.

    ``file`` is its file. ``reason``: why it fits no model, empty if it fits one.
    """

    adapter: str
    file: str
    offers: Mapping[str, AdapterOffer]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """An adapter of ``model`` is in memory, with ``bytes``; it took ``seconds`` to read."""

    model: str
    adapter: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AdapterEvicted:
    """An adapter of ``model`` is in memory no more."""

    model: str
    adapter: str


@dataclass(frozen=True, slots=True)
class RowLimitCorrected:
    """Real batches of the default size changed the row limit of ``model`` to ``max_rows``."""

    model: str
    max_rows: int

    def of(self, info: ModelInfo) -> ModelInfo:
        """``info``, corrected."""
        return info.with_row_limit(self.max_rows)


@dataclass(frozen=True, slots=True)
class SampleBytesCorrected:
    """An unfinished image of ``model`` held more than was measured: now ``bytes_per_sample``."""

    model: str
    bytes_per_sample: int

    def of(self, info: ModelInfo) -> ModelInfo:
        """``info``, corrected."""
        return info.with_bytes_per_sample(self.bytes_per_sample)


@dataclass(frozen=True, slots=True)
class DenoiserCompiled:
    """Batches of ``model`` run its compiled denoiser from now on."""

    model: str

    def of(self, info: ModelInfo) -> ModelInfo:
        """``info``, corrected."""
        return info.with_runtime(denoiser=info.runtime.denoiser.compiled)


Correction = RowLimitCorrected | SampleBytesCorrected | DenoiserCompiled
"""What the engine learned about a model after its start."""


class Counted(StrEnum):
    """What an engine counts besides batches."""

    PROMPTS_CACHED = "prompts_cached"
    PROMPTS_ENCODED = "prompts_encoded"
    PROMPTS_TRUNCATED = "prompts_truncated"
    OUT_OF_MEMORY_SPLIT = "out_of_memory_split"
    OUT_OF_MEMORY_FAILED = "out_of_memory_failed"
    NON_FINITE_RECOVERED = "non_finite_recovered"
    NON_FINITE_FAILED = "non_finite_failed"


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """The counts of ``model`` since the last event of this kind."""

    model: str
    counts: dict[Counted, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMeasured:
    """A batch of ``rows`` rows took ``peak_bytes`` besides the weights; 0 rows are a decode."""

    model: str
    width: int
    height: int
    rows: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeDone:
    """The encode of ``prompts`` prompts that were not cached took ``seconds``.

    A prompt is one call of a pipeline's ``encode_prompt``, or one text. ``cache_bytes`` are those
    of the model's prompt cache after it.
    """

    model: str
    prompts: int
    seconds: float
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeDone:
    """The decode of one image, from latents to pixels, took ``seconds``."""

    model: str
    width: int
    height: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReady:
    """One image of a job is encoded."""

    job_id: str
    image_index: int
    image: EncodedImage


@dataclass(frozen=True, slots=True)
class JobFinished:
    """Every image of the job was emitted."""

    job_id: str
    stages: StageSeconds


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job failed."""

    job_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job was cancelled, or ``expired``: its deadline passed.

    ``wasted_seconds`` is its rows' share of the time of its batches.
    """

    job_id: str
    expired: bool
    wasted_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensors:
    """A GPU's sensors; None if the driver does not have one. ``utilisation`` is 0 to 1."""

    utilisation: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The engine's memory in bytes, by kind (see ``telemetry``); emitted about once a second."""

    device: str
    by_kind: dict[str, int]
    host_rss: int
    sensors: Sensors = field(default_factory=Sensors)


Event = (
    EngineReady
    | ModelInHost
    | ModelLoaded
    | ModelNotLoaded
    | ModelUnloaded
    | ModelFetching
    | ModelsDescribed
    | EngineDied
    | JobTaken
    | JobStarted
    | SampleProgress
    | PreviewReady
    | BatchDone
    | AdapterChecked
    | AdapterLoaded
    | AdapterEvicted
    | RowLimitCorrected
    | SampleBytesCorrected
    | DenoiserCompiled
    | EncodeDone
    | DecodeDone
    | EngineCounts
    | PeakMeasured
    | ImageReady
    | JobFinished
    | JobFailed
    | JobCancelled
    | MemoryReport
)
