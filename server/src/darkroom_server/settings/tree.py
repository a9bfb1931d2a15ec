"""Every setting, declared once: flag, environment variable, file key and page are made from here.

These are plain dataclasses, so that `--help` need not wait for pydantic; ``settings.load`` lets
pydantic check the values, by the same annotations.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Predicate

from darkroom_server.core.engine_config import Attention, Dtype, Preset
from darkroom_server.settings.lifetime import Results, Shutdown
from darkroom_server.settings.logs import Logs
from darkroom_server.settings.network import Network, Security
from darkroom_server.settings.option import Setting


def _is_device(value: str) -> bool:
    devices = value.split(",")
    return (devices[0] in ("auto", "cpu", "cuda") and len(devices) == 1) or all(
        kind == "cuda" and number.isdecimal()
        for kind, _, number in (device.partition(":") for device in devices)
    )


def _is_slice_size(value: str) -> bool:
    return value in ("auto", "max") or (value.isdecimal() and int(value) > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models the server holds."""

    model: Annotated[
        tuple[str, ...],
        Setting(
            "A model to hold: a pipeline folder, a single file or a hub id, with a name of its own "
            "if you like. May be given several times.",
            choose="A path that exists wins over a hub id. Without a name, a folder is known by "
            "its own name and a hub id by itself. `demo` is the model that comes with the server. "
            "In the environment, separate several by commas.",
            metavar="[NAME=]PATH_OR_HUB_ID[@REVISION]",
            default="the demo model",
        ),
    ] = ()
    variant: Annotated[
        str | None,
        Setting(
            "Which variant of the weight files to load, such as `fp16`.",
            choose="Set it where a model offers one: it halves the download.",
            metavar="NAME",
            default="none",
        ),
    ] = None
    model_config: Annotated[
        str | None,
        Setting(
            "A pipeline folder that tells how to read a single file.",
            choose="Needed for a `.safetensors` file where the hub cannot be asked.",
            metavar="FOLDER",
            default="none",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the models run."""

    device: Annotated[
        str,
        Predicate(_is_device),
        Setting(
            "Where the models run.",
            choose="`auto` takes the first GPU, and the CPU where there is none. `cuda:0,cuda:1` "
            "starts an engine on each, and each job goes to the one that will finish it first.",
            metavar="auto|cpu|cuda|cuda:N[,cuda:N]",
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Setting(
            "The weights' type.",
            choose="`auto` leaves it to the preset: float16 on a GPU; on a CPU bfloat16, or with "
            "`fast` the faster of float32 and bfloat16.",
        ),
    ] = Dtype.AUTO
    preset: Annotated[
        Preset,
        Setting(
            "A starting point for the settings below.",
            choose="`frugal` saves memory, `fast` takes what it can get, `tiny` squeezes into the "
            "smallest GPUs; `auto` is `frugal` on a GPU and `fast` on a CPU.",
        ),
    ] = Preset.AUTO
    attention: Annotated[
        Attention | None,
        Setting(
            "How attention is computed.",
            choose="`sdpa` is the faster one, `sliced` is diffusers' attention slicing.",
            default="the preset's",
        ),
    ] = None
    slice_size: Annotated[
        Annotated[str, Predicate(_is_slice_size)] | None,
        Setting(
            "Heads per slice, with sliced attention.",
            choose="`auto` halves them, `max` takes one at a time, for the least memory.",
            metavar="auto|max|N",
            default="the preset's",
        ),
    ] = None
    autocast: Annotated[
        bool | None,
        Setting("Run the denoiser under torch.autocast.", default="the preset's"),
    ] = None
    channels_last: Annotated[
        bool | None,
        Setting(
            "Keep the denoiser's weights and activations channels last in memory.",
            default="the preset's",
        ),
    ] = None
    vae_tiling: Annotated[
        bool | None,
        Setting(
            "Decode images in tiles.",
            choose="Saves memory above about 1024 pixels, and may leave faint seams.",
            default="the preset's",
        ),
    ] = None
    threads: Annotated[
        Annotated[int, Ge(1)] | None,
        Setting(
            "Threads for torch on a CPU.", metavar="N", default="as many as the process may use"
        ),
    ] = None
    max_rows: Annotated[
        Annotated[int, Ge(2)] | None,
        Setting(
            "The most rows of a denoiser pass; an image with guidance takes two.",
            choose="Lower it to trade throughput for latency, or to leave memory to others.",
            metavar="N",
            default="measured at start",
        ),
    ] = None
    safety_checker: Annotated[
        bool,
        Setting("Check images with the model's safety checker, and withhold flagged ones."),
    ] = False
    engine: Annotated[
        Literal["process", "thread"],
        Setting(
            "Where the engine runs.",
            choose="`process`: a fault of the device ends the engine's own process, which is "
            "restarted, and accepted jobs are drawn again. `thread` is for debugging.",
        ),
    ] = "process"
    engines: Annotated[
        int,
        Ge(1),
        Setting(
            "Engines per device.",
            choose="More than one is for tests: engines on one device share its speed.",
            metavar="N",
        ),
    ] = 1
    engine_timeout: Annotated[
        float,
        Gt(0),
        Setting(
            "Seconds of silence after which an engine that has work is killed and restarted.",
            choose="Several times the longest pass or decode of your largest images.",
            metavar="SECONDS",
        ),
    ] = 60.0
    engine_max_restarts: Annotated[
        int,
        Ge(0),
        Setting(
            "Restarts of an engine in ten minutes; one more and it is given up. Without any left "
            "the server exits, for its own supervisor to see.",
            metavar="N",
        ),
    ] = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """How many jobs are taken."""

    max_queued_jobs: Annotated[
        int,
        Ge(0),
        Setting(
            "Jobs that may wait for a place in the engine; more are refused.",
            choose="What the server can finish within your callers' patience: the images per "
            "second that you measure, times the seconds that they wait.",
            metavar="N",
        ),
    ] = 128
    max_queued_megapixel_steps: Annotated[
        float,
        Gt(0),
        Setting(
            "Work that may wait, in megapixel-steps: an image of a million pixels and 30 steps is "
            "30 of them. More is refused.",
            choose="A bound for many large jobs, where `max_queued_jobs` bounds many small ones. A "
            "job that is larger by itself may wait alone.",
            metavar="N",
        ),
    ] = 20_000.0
    early_refusal: Annotated[
        bool,
        Setting(
            "Refuse a request at once that cannot be expected to be finished by its deadline.",
            choose="Without it such requests are tried until their deadline, and what they took "
            "is lost to the others.",
        ),
    ] = True
    max_resident_samples: Annotated[
        int,
        Ge(1),
        Setting(
            "Images in the engine at once; a job is handed over while there are fewer.",
            choose="Several times the rows of a pass keeps the engine busy. More only takes "
            "memory.",
            metavar="N",
        ),
    ] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The tree. Each part of the server receives its own section only."""

    models: Models = field(default_factory=Models)
    engine: Engine = field(default_factory=Engine)
    network: Network = field(default_factory=Network)
    security: Security = field(default_factory=Security)
    dispatch: Dispatch = field(default_factory=Dispatch)
    results: Results = field(default_factory=Results)
    shutdown: Shutdown = field(default_factory=Shutdown)
    logs: Logs = field(default_factory=Logs)
