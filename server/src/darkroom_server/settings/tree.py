"""Every setting, declared once. Flag, environment variable, file key and docs are built from here.

These are plain dataclasses, because importing pydantic would slow down `--help`. ``settings.load``
checks the values with pydantic, by the same annotations.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Predicate

from darkroom_server.core.engine_config import (
    PROMPT_CACHE_BYTES,
    Attention,
    Compile,
    Dtype,
    Preset,
)
from darkroom_server.settings.adapters import Adapters
from darkroom_server.settings.http import Http
from darkroom_server.settings.images import Images
from darkroom_server.settings.lifetime import Results, Shutdown
from darkroom_server.settings.logs import Logs
from darkroom_server.settings.models import Models
from darkroom_server.settings.network import Network, Security
from darkroom_server.settings.option import Setting


def _is_device(value: str) -> bool:
    devices = value.split(",")
    return (devices[0] in ("auto", "cpu", "cuda") and len(devices) == 1) or all(
        kind == "cuda" and number.isdecimal()
        for kind, _, number in (device.partition(":") for device in devices)
    )


def _is_ledger(value: str) -> bool:
    kind, _, path = value.partition(":")
    if kind in ("postgresql", "postgres"):
        return path.startswith("//")
    return (kind == "sqlite" and bool(path)) or value == "memory"


def _is_slice_size(value: str) -> bool:
    return value in ("auto", "max") or (value.isdecimal() and int(value) > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the models run."""

    device: Annotated[
        str,
        Predicate(_is_device),
        Setting(
            "The devices to run the models on.",
            choose="`auto` is the first GPU, or the CPU if there is none. `cuda:0,cuda:1` starts "
            "one engine on each; a job goes to the engine that is expected to finish it first.",
            metavar="auto|cpu|cuda|cuda:N[,cuda:N]",
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Setting(
            "The data type of the weights.",
            choose="`auto` follows a rule, never a measurement, and logs it: on a GPU float16 for "
            "UNets and bfloat16 for transformers; bfloat16 on a CPU, but with `fast` float32 if "
            "the CPU has no bfloat16 instructions. A type that overflows in a model is a warning.",
        ),
    ] = Dtype.AUTO
    preset: Annotated[
        Preset,
        Setting(
            "A starting point for the settings below.",
            choose="`frugal` saves memory, `fast` is for speed, `max` is `fast` with a compiled "
            "denoiser, on a GPU under graphs, `tiny` fits into the smallest GPUs; `auto` is "
            "`frugal` on a GPU and `fast` on a CPU. Each model takes of it what suits its family.",
        ),
    ] = Preset.AUTO
    attention: Annotated[
        Attention | None,
        Setting(
            "The attention implementation.",
            choose="`sdpa` is faster, and uses less memory if torch has a fused kernel: on CPUs "
            "and on NVIDIA's GPUs since Turing. `sliced` (diffusers' attention slicing) uses less "
            "on others. Transformers have no slices and run with `sdpa`.",
            default="the preset's",
        ),
    ] = None
    slice_size: Annotated[
        Annotated[str, Predicate(_is_slice_size)] | None,
        Setting(
            "Heads per slice of sliced attention.",
            choose="`auto` takes half of them; `max` takes one at a time, for the least memory.",
            metavar="auto|max|N",
            default="the preset's",
        ),
    ] = None
    autocast: Annotated[
        bool | None,
        Setting(
            "Run the denoiser under torch.autocast.",
            default="the preset's, and off for models that it would harm",
        ),
    ] = None
    compile: Annotated[
        Compile | None,
        Setting(
            "Compile the denoiser of each model for this machine.",
            choose="`background` serves at once and compiles in a process of the lowest priority, "
            "for minutes; `blocking` compiles first; `cached` uses what an earlier start or "
            "`darkroom-server compile` left on disk; `off` does not. With attention `sdpa` and "
            "without autocast, on a GPU with preset `max`; it needs a C++ compiler. Exact jobs "
            "never use it.",
            default="the preset's",
        ),
    ] = None
    channels_last: Annotated[
        bool | None,
        Setting(
            "Store the weights and activations of the denoiser and the VAE in channels-last order.",
            default="the preset's, for each of them",
        ),
    ] = None
    vae_tiling: Annotated[
        bool | None,
        Setting(
            "Decode images in tiles.",
            choose="Saves memory above about 1024 pixels; may leave faint seams.",
            default="the preset's",
        ),
    ] = None
    threads: Annotated[
        Annotated[int, Ge(1)] | None,
        Setting(
            "Threads for torch on a CPU.", metavar="N", default="all CPUs that the process may use"
        ),
    ] = None
    rows: Annotated[
        Annotated[int, Ge(2)] | None,
        Setting(
            "The row limit of a batch of the denoiser, as an exact number; an image with guidance "
            "takes two rows.",
            choose="A lower limit trades throughput for latency. Without it, the limit is "
            "measured at start and corrected by real batches.",
            metavar="N",
            default="measured",
        ),
    ] = None
    max_rows: Annotated[
        Annotated[int, Ge(2)] | None,
        Setting(
            "An upper bound of the row limit that is measured; ignored with `--rows`.",
            choose="Saves memory, or bounds latency.",
            metavar="N",
            default="64",
        ),
    ] = None
    prompt_cache_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Memory for the embeddings of prompts, in bytes, for each model; 0 caches none.",
            choose="Raise it if `darkroom_prompt_lookups_total` has many misses and your callers "
            "repeat prompts: an encoder of billions of weights takes as long as many batches. "
            "Embeddings are kept in host memory; those of Stable Diffusion 1.x and 2.x, at most "
            "256 of them, on the device.",
            metavar="N",
            default="268435456, which is 256 MiB",
        ),
    ] = PROMPT_CACHE_BYTES
    measurement_cache: Annotated[
        bool,
        Setting(
            "Keep measurements and compiled denoisers on disk, so that the next start is faster.",
            choose="They are in `measurements` and `compiled` below `--state-dir`, and hold for "
            "models of equal configuration on equal hardware.",
        ),
    ] = True
    safety_checker: Annotated[
        bool,
        Setting("Check images with the model's safety checker and withhold flagged ones."),
    ] = False
    engine: Annotated[
        Literal["process", "thread"],
        Setting(
            "Run the engine in its own process, or in a thread of the server.",
            choose="With `process`, a device fault ends only the engine process: the server "
            "restarts it and runs accepted jobs again. `thread` is for debugging.",
        ),
    ] = "process"
    engines: Annotated[
        int,
        Ge(1),
        Setting(
            "Engines per device.",
            choose="More than one is for tests only: engines on one device share its speed.",
            metavar="N",
        ),
    ] = 1
    engine_timeout: Annotated[
        float,
        Gt(0),
        Setting(
            "Seconds without an event after which a busy engine is killed and restarted.",
            choose="Several times the longest batch or decode of your largest images.",
            metavar="SECONDS",
        ),
    ] = 60.0
    load_timeout: Annotated[
        float,
        Gt(0),
        Setting(
            "Seconds after which an engine that still loads its models is killed and restarted.",
            choose="Longer than the first load takes, the download included. Once an engine has "
            "loaded, it gets four times that time, at least a minute, to load again.",
            metavar="SECONDS",
        ),
    ] = 1800.0
    engine_max_restarts: Annotated[
        int,
        Ge(0),
        Setting(
            "Most restarts of an engine in ten minutes; after one more death it is not restarted. "
            "When no engine remains, the server exits.",
            metavar="N",
        ),
    ] = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Queue limits and deadlines."""

    max_queued_jobs: Annotated[
        int,
        Ge(0),
        Setting(
            "Most jobs that wait for a place in an engine; further jobs are rejected.",
            choose="What the server can finish while your callers are willing to wait: measured "
            "images per second × seconds of waiting.",
            metavar="N",
        ),
    ] = 128
    max_queued_megapixel_steps: Annotated[
        float,
        Gt(0),
        Setting(
            "Most work in the queue, in megapixel-steps; further jobs are rejected. An image of "
            "one million pixels and 30 steps is 30 megapixel-steps.",
            choose="Bounds many large jobs, as `--max-queued-jobs` bounds many small ones. A job "
            "above the limit by itself is accepted if the queue is empty.",
            metavar="N",
        ),
    ] = 20_000.0
    early_refusal: Annotated[
        bool,
        Setting(
            "Reject a request at once if it is not expected to finish by its deadline.",
            choose="Without it, such requests run until their deadline and waste engine time.",
        ),
    ] = True
    max_resident_samples: Annotated[
        int,
        Ge(1),
        Setting(
            "Images in an engine at once; the next job goes to the engine while it has fewer, and "
            "while what they hold between batches fits its memory.",
            choose="Several times the rows of a batch keep the engine busy. More only costs "
            "memory.",
            metavar="N",
        ),
    ] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Where the server writes."""

    state_dir: Annotated[
        str | None,
        Setting(
            "The folder below which the server writes; it is created if it does not exist.",
            choose="A mount that can be written, if the root file system is read-only. With it, "
            "temporary files and compiled kernels are there too, unless `TMPDIR`, "
            "`CUDA_CACHE_PATH` or `PYTORCH_KERNEL_CACHE_PATH` name other folders. Models from the "
            "hub are in `HF_HOME`.",
            metavar="FOLDER",
            default="`$XDG_CACHE_HOME/darkroom`, or `~/.cache/darkroom` without the variable",
        ),
    ] = None
    ledger: Annotated[
        str,
        Predicate(_is_ledger),
        Setting(
            "Where accepted jobs are written down: in memory, in an SQLite file, or in PostgreSQL.",
            choose="With a file, a server that is killed and started again loses no submitted job "
            "and none with `on_disconnect: ON_DISCONNECT_KEEP`. It holds their prompts and images "
            "until `--result-ttl` after their end. One server at a time can use it. A database is "
            "shared by several servers, which take over what one of them loses; it needs the extra "
            "`fleet`. A flag takes no password: use `PGPASSFILE` or `PGPASSWORD`. See "
            "docs/durability.md.",
            metavar="memory|sqlite:PATH|postgresql://USER@HOST/DATABASE",
        ),
    ] = "memory"
    claim_delay: Annotated[
        float,
        Ge(0.0),
        Setting(
            "Seconds that a job waits in a shared `--ledger` before a server loads a model for it "
            "that another server has in memory.",
            choose="About as long as a batch takes: until then the server that has the model may "
            "get room. More saves loads, and delays jobs.",
            metavar="SECONDS",
        ),
    ] = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings. Each part of the server receives only its own section."""

    models: Models = field(default_factory=Models)
    adapters: Adapters = field(default_factory=Adapters)
    engine: Engine = field(default_factory=Engine)
    storage: Storage = field(default_factory=Storage)
    network: Network = field(default_factory=Network)
    http: Http = field(default_factory=Http)
    security: Security = field(default_factory=Security)
    dispatch: Dispatch = field(default_factory=Dispatch)
    images: Images = field(default_factory=Images)
    results: Results = field(default_factory=Results)
    shutdown: Shutdown = field(default_factory=Shutdown)
    logs: Logs = field(default_factory=Logs)
