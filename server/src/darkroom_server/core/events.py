"""What the engine tells: plain data, in the order in which it happened.

Every job that was submitted ends in exactly one of ``JobFinished``, ``JobFailed`` and
``JobCancelled``.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Every model is loaded and warmed up."""

    models: tuple[ModelInfo, ...]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine stopped for good; ``message`` is one line for the operator."""

    message: str


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The first pass of a job begins."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """One sample took a step: ``step`` of ``steps`` denoiser calls are done.

    ``rows`` shared the pass, which took ``seconds``.
    """

    job_id: str
    image_index: int
    step: int
    steps: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassDone:
    """One pass of ``rows`` rows through the denoiser of ``model`` took ``seconds``.

    All its images are of ``width`` × ``height`` pixels.
    """

    model: str
    width: int
    height: int
    rows: int
    seconds: float


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
class MemoryReport:
    """Memory of the engine, in bytes, by kind (see ``telemetry``); sent about once a second."""

    device: str
    by_kind: dict[str, int]
    host_rss: int


Event = (
    EngineReady
    | EngineDied
    | JobStarted
    | SampleProgress
    | PassDone
    | DecodeDone
    | ImageReady
    | JobFinished
    | JobFailed
    | JobCancelled
    | MemoryReport
)
