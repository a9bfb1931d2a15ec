"""Settings of the models: which ones there are, when they are loaded, and their memory."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from darkroom_server.core.quantization import Offload
from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models to serve."""

    model: Annotated[
        tuple[str, ...],
        Setting(
            "A model to serve: a pipeline folder, a single file or a hub id, with an optional "
            "name. May be given several times.",
            choose="An existing path wins over a hub id. Without NAME, requests use the name of "
            "the folder or file, or the hub id. `demo` is the model in the server package. In the "
            "environment, separate several models by commas.",
            metavar="[NAME=]PATH_OR_HUB_ID[@REVISION]",
            default="the demo model, without `--models-dir`",
        ),
    ] = ()
    models_dir: Annotated[
        str | None,
        Setting(
            "A folder of models: each pipeline folder and each `.safetensors` file below it is in "
            "the catalogue, and is loaded when a request names it.",
            choose="A model's name is its path below the folder, without the ending of a file. "
            "They are described from their configurations at start; those that appear later are "
            "found when a request names them or somebody lists the models. Only the operator "
            "should be able to write to the folder.",
            metavar="FOLDER",
            default="none",
        ),
    ] = None
    on_demand: Annotated[
        bool,
        Setting(
            "Load the models of `--model` when a request names them, not at start.",
            choose="Without it they are loaded at start and stay in memory, until an admin unloads "
            "them.",
        ),
    ] = False
    allow_download: Annotated[
        bool,
        Setting(
            "Fetch models that are loaded on demand from the hub if they are not on this machine.",
            choose="Models that are loaded at start are always fetched.",
        ),
    ] = False
    device_memory_budget: Annotated[
        Annotated[int, Gt(0)] | None,
        Setting(
            "Device memory for the weights of models, in bytes, on each device. To load one more, "
            "models that are cheap to bring back and rarely used are unloaded.",
            choose="Models of `--model` and pinned ones are never unloaded.",
            metavar="BYTES",
            default="what is free, less what the largest batch needs",
        ),
    ] = None
    host_memory_budget: Annotated[
        Annotated[int, Ge(0)] | None,
        Setting(
            "Host memory for the weights of models that are not on the device, in bytes, for each "
            "engine. A model that leaves the device stays there, and comes back by a copy.",
            choose="0 keeps none. On a CPU it is memory beside the device's budget: a load from it "
            "need not read, convert and check the weights.",
            metavar="BYTES",
            default="with a GPU what is free, less what the largest batch needs, shared by the "
            "engines; on a CPU none",
        ),
    ] = None
    quantize: Annotated[
        tuple[str, ...],
        Setting(
            "Store the weights of a model in fewer bits. May be given several times.",
            choose="`int8` and `nf4` are for the denoiser and the text encoders, and need the "
            "extras `int8` and `nf4`; `nf4` needs a GPU. `fp8` is for the denoiser. `fp8-dynamic` "
            "multiplies in 8-bit floats too: it needs the extra `fp8-dynamic` and a GPU of compute "
            "capability 8.9 or later, and rejects `exact` requests. `gguf:FILE` takes the denoiser "
            "from a GGUF file and needs the extra `gguf`. See docs/quantization.md.",
            metavar="NAME=int8|fp8|fp8-dynamic|nf4|gguf:FILE",
            default="none",
        ),
    ] = ()
    offload: Annotated[
        Offload,
        Setting(
            "What stays in the host's memory, and is copied to the device for each of its calls.",
            choose="`text-encoder` for models whose text encoders are large; `group` is for the "
            "denoiser too, layer by layer, which is slow and needs least memory.",
        ),
    ] = Offload.NONE
    swap_wait: Annotated[
        float,
        Ge(0),
        Setting(
            "How long a job waits for its model while jobs of models in memory go first. By then "
            "the model is loaded, if the loads of others that wait longer allow it.",
            choose="A swap is made earlier if enough jobs wait for it. A longer time serves more "
            "jobs with each load; a shorter one is fairer to rarely used models. Above the time "
            "that a load takes.",
            metavar="SECONDS",
        ),
    ] = 30.0
    variant: Annotated[
        str | None,
        Setting(
            "The variant of the weight files to load, such as `fp16`.",
            choose="Set it if the model offers one: `fp16` halves the download.",
            metavar="NAME",
            default="none",
        ),
    ] = None
    model_config: Annotated[
        str | None,
        Setting(
            "A pipeline folder with the configuration for a single file.",
            choose="Needed for a `.safetensors` file if the hub cannot be reached.",
            metavar="FOLDER",
            default="none",
        ),
    ] = None
