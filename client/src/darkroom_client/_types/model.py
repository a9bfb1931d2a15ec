"""What a model on the server is, takes and runs as."""

from dataclasses import dataclass

from darkroom_client._types.enums import ImageFormat, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """What an unset field of a request means; sizes in pixels.

    ``scheduler`` and ``format`` are None where the server names one that is newer than this
    client.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: Scheduler | None
    format: ImageFormat | None
    quality: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the server accepts for a model; every bound is inclusive, sizes are in pixels.

    ``prompt_tokens``: tokens that the model reads of a prompt; what is beyond them is ignored
    and reported as ``Image.prompt_truncated``. ``max_rows``: rows of one denoiser pass at the
    default size; an image with guidance takes two.
    """

    min_size: int
    max_size: int
    size_multiple: int
    max_guidance_scale: float
    max_image_count: int
    max_prompt_bytes: int
    prompt_tokens: int
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOffer:
    """A scheduler that a model offers, and the steps it takes (inclusive)."""

    scheduler: Scheduler
    min_steps: int
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRuntime:
    """How a model runs: ``device`` such as "cuda:0", ``dtype`` such as "float16".

    ``attention`` is "sliced" or "sdpa"; ``slice_size`` is "auto", "max" or a number, and empty
    without sliced attention.
    """

    device: str
    dtype: str
    preset: str
    attention: str
    slice_size: str
    autocast: bool
    vae_tiling: bool
    channels_last: bool
    fp8_storage: bool
    safety_checker: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A diffusers pipeline that the server holds.

    Until it is ``ready`` (loaded and warmed up) only ``id`` is known: the texts are empty and
    ``defaults``, ``limits`` and ``runtime`` are None. ``schedulers`` leaves out those that are
    newer than this client, which no call could name.
    """

    id: str
    ready: bool
    revision: str
    kind: str
    defaults: ModelDefaults | None
    limits: ModelLimits | None
    schedulers: tuple[SchedulerOffer, ...]
    runtime: ModelRuntime | None
