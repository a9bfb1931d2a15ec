"""Settings of adapters and ControlNets: which ones there are, and their limits."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """The LoRA adapters, IP-Adapters and ControlNets on offer."""

    lora: Annotated[
        tuple[str, ...],
        Setting(
            "A LoRA adapter on offer: a `.safetensors` file in the layout of diffusers, kohya or "
            "PEFT, a folder with one, or a hub id. May be given several times.",
            choose="Requests name it by NAME. An existing path wins over a hub id. The server does "
            "not start if it fits none of the models. In the environment, separate several by "
            "commas.",
            metavar="NAME=PATH_OR_HUB_ID[@REVISION]",
            default="none",
        ),
    ] = ()
    lora_dir: Annotated[
        str | None,
        Setting(
            "A folder of LoRA adapters: each `.safetensors` file in it is on offer, by its name "
            "without the ending.",
            choose="Files that fit no model are logged and left out. A file that appears later is "
            "on offer once an admin adds it by `darkroom adapters add NAME`. Only the operator "
            "should be able to write to the folder.",
            metavar="FOLDER",
            default="none",
        ),
    ] = None
    max_loras: Annotated[
        int,
        Ge(1),
        Setting(
            "Most different LoRA adapters in one batch.",
            choose="As many as callers use at the same time. Each takes memory on the device, by "
            "its rank.",
            metavar="N",
        ),
    ] = 8
    max_request_loras: Annotated[
        int,
        Ge(1),
        Setting(
            "Most LoRA adapters in one request; never more than `--max-loras`.",
            choose="One request with many leaves no room for others in its batches.",
            metavar="N",
        ),
    ] = 4
    max_lora_rank: Annotated[
        int,
        Ge(1),
        Setting(
            "The greatest rank of a LoRA adapter; requests for one with a greater rank are "
            "rejected.",
            choose="Bounds the memory and the time that an adapter takes.",
            metavar="N",
        ),
    ] = 128
    lora_cache_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Host memory for the weights of LoRA adapters, for each engine. When full, the least "
            "recently used one is evicted.",
            choose="Adapters of jobs that wait or run are kept, even above the limit.",
            metavar="BYTES",
        ),
    ] = 1024**3
    ip_adapter: Annotated[
        tuple[str, ...],
        Setting(
            "The IP-Adapter of a model, for requests with `ip_adapter_image`: a `.safetensors` "
            "file, or a file of the hub as owner/name/path/file.safetensors. One for each model; "
            "may be given several times.",
            choose="For Stable Diffusion and SDXL. The image encoder is the folder `image_encoder` "
            "beside the file, or `models/image_encoder` beside its folder: the first one whose "
            "width fits. In the environment, separate several by commas.",
            metavar="MODEL=PATH_OR_HUB_FILE[@REVISION]",
            default="none",
        ),
    ] = ()
    controlnet: Annotated[
        tuple[str, ...],
        Setting(
            "A ControlNet on offer: a folder or a hub id, as diffusers saves it. May be given "
            "several times.",
            choose="Requests name it by NAME. Without MODEL it is for each model that it fits, and "
            "the server does not start if it fits none. The device holds it beside the model. In "
            "the environment, separate several by commas.",
            metavar="[MODEL:]NAME=PATH_OR_HUB_ID[@REVISION]",
            default="none",
        ),
    ] = ()
    max_controls: Annotated[
        int,
        Ge(1),
        Setting(
            "Most ControlNets in one request.",
            choose="Each adds a third to a half of the time of every step.",
            metavar="N",
        ),
    ] = 4
