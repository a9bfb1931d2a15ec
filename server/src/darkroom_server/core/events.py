"""What the engine tells: plain data, in the order in which it happened.

Every job that was submitted ends in exactly one of ``JobFinished``, ``JobFailed`` and
``JobCancelled``.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from darkroom_server.core.errors import Failure
from darkroom_server.core.job import ImageFormat
from darkroom_server.core.model import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the engine adds to a job to draw one of its images again."""

    scheduler_class: str
    scheduler_config_json: str
    device: str
    library_versions: dict[str, str]
    rows_in_last_pass: int
    pixels_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """One finished image; ``data`` is empty where the safety checker withheld it."""

    data: bytes
    format: ImageFormat
    width: int
    height: int
    seed: int
    prompt_truncated: bool
    flagged: bool
    replay: Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Where a job's time went. The stages of several images overlap."""

    queue: float = 0.0
    encode_prompt: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode_image: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """How one model came into memory: seconds to load and to warm up, and its weights' bytes."""

    model: str
    load_seconds: float
    warm_up_seconds: float
    bytes_by_component: dict[str, int]


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Every model is loaded and warmed up."""

    models: tuple[ModelInfo, ...]
    load_seconds: float
    loads: tuple[ModelLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine stopped for good; ``message`` is one line for the operator.

    ``fatal``: started again as it is, it would say the same.
    """

    message: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class JobTaken:
    """The engine turns to a job for the first time: its prompts are encoded next."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The first pass of a job begins."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """One sample took a step: ``step`` of ``steps`` denoiser calls are done.

    ``rows`` shared the pass, which took ``seconds``. The steps of a pass are told right before its
    ``BatchDone``, from the same thread.
    """

    job_id: str
    image_index: int
    step: int
    steps: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewReady:
    """What one sample looks like after ``step`` of its denoiser calls, in small."""

    job_id: str
    image_index: int
    step: int
    data: bytes
    format: ImageFormat
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """One pass of ``rows`` rows through the denoiser of ``model`` took ``seconds``.

    All its images are of ``width`` × ``height`` pixels. It was one step for each of ``samples``,
    of which ``joined`` took their first in company. ``max_rows`` is what the pass could have held,
    0 where nobody knows. ``ended_at`` is in ``time.monotonic`` seconds.
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


class Counted(StrEnum):
    """What an engine counts, besides passes."""

    PROMPTS_CACHED = "prompts_cached"
    PROMPTS_ENCODED = "prompts_encoded"
    PROMPTS_TRUNCATED = "prompts_truncated"
    OUT_OF_MEMORY_SPLIT = "out_of_memory_split"
    OUT_OF_MEMORY_FAILED = "out_of_memory_failed"
    NON_FINITE_RECOVERED = "non_finite_recovered"
    NON_FINITE_FAILED = "non_finite_failed"


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """What happened in the engine with ``model`` since it last told."""

    model: str
    counts: dict[Counted, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMeasured:
    """A pass of ``rows`` rows took ``peak_bytes`` besides the weights; 0 rows are a decode."""

    model: str
    width: int
    height: int
    rows: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeDone:
    """Turning the latents of one image into pixels took ``seconds``."""

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
    """Every image of the job was sent."""

    job_id: str
    stages: StageSeconds


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job was given up."""

    job_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job left the engine because it was told to, or its deadline passed.

    ``wasted_seconds`` is the time of the passes that its rows took a share of.
    """

    job_id: str
    expired: bool
    wasted_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensors:
    """What a GPU's driver says of it; None where it does not know. ``utilisation`` is 0 to 1."""

    utilisation: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Memory of the engine, in bytes, by kind (see ``telemetry``); sent about once a second."""

    device: str
    by_kind: dict[str, int]
    host_rss: int
    sensors: Sensors = field(default_factory=Sensors)


Event = (
    EngineReady
    | EngineDied
    | JobTaken
    | JobStarted
    | SampleProgress
    | PreviewReady
    | BatchDone
    | DecodeDone
    | EngineCounts
    | PeakMeasured
    | ImageReady
    | JobFinished
    | JobFailed
    | JobCancelled
    | MemoryReport
)
