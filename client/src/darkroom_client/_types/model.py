"""What a model on the server is, what it accepts, and how it runs."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from darkroom_client._types.enums import ImageFormat, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """The values of unset fields of a request; sizes in pixels.

    ``scheduler`` and ``format`` are None if the server's value is newer than this client.
    ``true_cfg_scale``, ``max_sequence_length``, ``strength`` (without a mask) and
    ``inpaint_strength`` (with one) are None if the model does not take them.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: Scheduler | None
    format: ImageFormat | None
    quality: int
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    strength: float | None = None
    inpaint_strength: float | None = None


class Task(StrEnum):
    """What a request asks for; it follows from the fields that it sets.

    TEXT_TO_IMAGE: from a prompt alone. IMAGE_TO_IMAGE: from ``image``. INPAINT: from ``image`` and
    ``mask_image``. EDIT: from ``reference_images``.
    """

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"
    EDIT = "edit"


class RowLimitSource(StrEnum):
    """Where a model's row limit comes from.

    SET: configured as an exact number. MEASURED: when the server started. REMEMBERED: measured at
    an earlier start. CORRECTED: measured or remembered, then changed by what real batches took.
    UNKNOWN: the server is older than this field, or the value is newer than this client.
    """

    SET = "set"
    MEASURED = "measured"
    REMEMBERED = "remembered"
    CORRECTED = "corrected"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """The bounds of a request for a model, all inclusive; sizes in pixels.

    ``prompt_tokens``: tokens that the model reads of a prompt; the rest is ignored and
    reported as ``Image.prompt_truncated``. ``max_rows``: rows of one denoiser pass at the
    default size, now; a guided image takes ``Guidance.rows``. ``row_limit_source``: how it was
    found. ``max_sequence_length``: the highest that a request may set, 0 if the model does not take
    it; so with the numbers of reference images, LoRAs and ControlNets. ``min_reference_side``: no
    side of a reference image may be shorter. ``sizes``: the only pairs of width and height that the
    model makes; any, if empty.
    """

    min_size: int
    max_size: int
    size_multiple: int
    max_guidance_scale: float
    max_image_count: int
    max_prompt_bytes: int
    prompt_tokens: int
    max_rows: int
    row_limit_source: RowLimitSource = RowLimitSource.UNKNOWN
    max_sequence_length: int = 0
    max_reference_images: int = 0
    min_reference_side: int = 0
    max_loras: int = 0
    max_controls: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOffer:
    """A scheduler that a model offers, with its range of steps (inclusive)."""

    scheduler: Scheduler
    min_steps: int
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRuntime:
    """How a model runs: ``device`` such as "cuda:0", ``dtype`` such as "float16".

    ``attention`` is "sliced" or "sdpa"; ``slice_size`` is "auto", "max" or a number; it is empty
    without sliced attention. ``channels_last`` is the denoiser's layout in memory, and
    ``vae_channels_last`` the VAE's: None if the server is older than this field, and the VAE has
    the denoiser's. ``format_rule``: why the dtype and the layouts were chosen; empty if they are
    configured, or if the server is older than this field. ``preset_rule``: why ``preset`` is in
    force, and what of it does not suit the model; empty if it is configured and
    all of it suits, or if the server is older. ``denoiser``: "eager" if batches run it as diffusers
    wrote it, "compiled", or "graphs" of its kernels; empty if the server is older.
    ``quantization``: how weights are stored in fewer bits, "int8", "fp8", "fp8-dynamic", with which
    requests must not be ``exact``, "nf4" or "gguf:FILE", and ``offload``: what is copied to the
    device for each of its calls, "text-encoder" or "group"; both are empty for nothing, or if the
    server is older.
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
    format_rule: str = ""
    preset_rule: str = ""
    denoiser: str = ""
    quantization: str = ""
    offload: str = ""
    vae_channels_last: bool | None = None


OPTIONAL_FIELDS = (
    "negative_prompt",
    "empty_negative_prompt",
    "guidance_scale",
    "guidance_rescale",
    "true_cfg_scale",
    "max_sequence_length",
    "prompt_2",
    "prompt_3",
    "negative_prompt_2",
    "negative_prompt_3",
    "prompt_syntax",
    "preview",
    "image",
    "mask_image",
    "strength",
    "reference_images",
    "loras",
    "controls",
    "ip_adapter_image",
    "ip_adapter_scale",
)
"""The fields of a request that not every model takes, and previews."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a model applies classifier-free guidance, and what it costs.

    An image is guided if the request's field ``scale`` is more than ``above``, and, if
    ``needs_negative``, only with a negative prompt or ``empty_negative_prompt``. ``scale`` is
    "guidance_scale" or "true_cfg_scale", or empty if no image is guided. For each step of the
    scheduler, a guided image takes ``rows`` rows in each of ``calls`` denoiser calls; other images
    take one row in one call.
    """

    scale: str
    above: float
    needs_negative: bool
    rows: int
    calls: int


class ModelState(StrEnum):
    """Where a model of the server's catalogue is.

    AVAILABLE: on disk or on the hub; a request for it waits until it is loaded. LOADING: it is
    being fetched or loaded; ``Model.load`` says how far that is. RESIDENT: in the device's memory.
    HOST: its weights are in the host's memory, and the device has none of them. FAILED: it cannot
    be loaded; ``Model.state_reason`` says why, and ``Client.load_model`` tries again. UNKNOWN: the
    value is newer than this client.
    """

    AVAILABLE = "available"
    LOADING = "loading"
    RESIDENT = "resident"
    HOST = "host"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """How far the load of a model is.

    ``fetched_bytes`` of ``fetch_bytes`` have come from the hub; both are 0 if nothing is fetched,
    and ``fetch_bytes`` also while it is not known. ``remaining_seconds``: what the load probably
    still takes; None if that is not known.
    """

    fetched_bytes: int = 0
    fetch_bytes: int = 0
    remaining_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A diffusers pipeline on the server.

    Of a model that the server has not read yet, only ``id``, ``ready`` and ``state`` are known: the
    strings are empty, and ``defaults``, ``limits``, ``runtime`` and ``guidance`` are None. Of one
    that it has read and that is not ``ready`` (loaded and warmed up), ``runtime`` is None and
    ``limits.max_rows`` 0. ``schedulers`` omits those that are newer than this client.

    ``optional_fields``: the fields of a request that the model takes, of those that not every model
    takes ("preview" are the previews of a stream); the server rejects the others. ``guidance``: how
    the model is guided. ``unbatched_reason``: why its denoiser calls are not merged into batches,
    empty if they are. ``tasks``: what the model can do, without those that are newer than this
    client. From a server older than these fields they are empty and None.

    ``state``: where the model is; of a server older than this field, RESIDENT if it is ``ready``,
    else LOADING. ``state_reason``: why it cannot be loaded, empty if the state is not FAILED.
    ``weight_bytes``: its weights, in memory if it is resident, else as its files have them; 0 if
    not known. ``last_used``: when a job last used it, in UTC; None if none has. ``pinned``: it
    stays in memory whatever else is asked for. ``load``: how far its load is, None if the state is
    not LOADING. ``files_changed``: its files were written since it was read into memory;
    ``Client.load_model`` reads them again.
    """

    id: str
    ready: bool
    revision: str
    kind: str
    defaults: ModelDefaults | None
    limits: ModelLimits | None
    schedulers: tuple[SchedulerOffer, ...]
    runtime: ModelRuntime | None
    optional_fields: tuple[str, ...] = ()
    guidance: Guidance | None = None
    unbatched_reason: str = ""
    tasks: tuple[Task, ...] = ()
    state: ModelState = ModelState.UNKNOWN
    state_reason: str = ""
    weight_bytes: int = 0
    last_used: datetime | None = None
    pinned: bool = False
    load: ModelLoad | None = None
    files_changed: bool = False
