"""Loads components whose weights are stored in fewer bits, by diffusers' quantizers."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Offload, Quantization
from darkroom_server.engine.components.classes import component_class
from darkroom_server.engine.warmup.formats import Hardware
from darkroom_server.engine.warmup.presets import Runtime

if TYPE_CHECKING:
    from darkroom_server.engine.loading.pipeline import ModelFiles

PACKAGES = {
    Quantization.INT8: ("torchao", "int8"),
    Quantization.FP8_DYNAMIC: ("torchao", "fp8-dynamic"),
    Quantization.NF4: ("bitsandbytes", "nf4"),
    Quantization.GGUF: ("gguf", "gguf"),
}
"""The package that each kind needs, and the extra of darkroom-server that brings it."""

METHODS = {"torchao": Quantization.INT8, "bitsandbytes": Quantization.NF4}
"""By the name in a component's ``config.json``, for files that are quantised already."""

FLOAT8 = (8, 9)
"""The first CUDA compute capability that multiplies in 8-bit floats (Ada)."""


def check_quantization(files: "ModelFiles", runtime: Runtime) -> None:
    """Raise ``StartupError`` if the model cannot be loaded as its source and its files ask for."""
    source, device, offload = files.source, runtime.device, runtime.offload
    kinds = {own_quantization(files.path, part) for part in files.parts} - {None}
    if source.quantize is not None:
        kinds.add(source.quantize.kind)
    for kind in kinds:
        option = f"--quantize {source.id}={kind}"
        package, extra = PACKAGES.get(kind, ("", "")) if kind else ("", "")
        if package and importlib.util.find_spec(package) is None:
            raise StartupError(
                f"{option} needs the package {package}: pip install 'darkroom-server[{extra}]'"
            )
        if kind is Quantization.NF4 and device.type != "cuda":
            raise StartupError(
                f"{option} needs a GPU with CUDA, and the models run on {device}; use int8 or a "
                "GGUF file"
            )
        if kind is Quantization.FP8_DYNAMIC:
            _check_float8(option, files, runtime)
    others = kinds - {Quantization.FP8}
    if offload is Offload.TEXT_ENCODER:
        others -= {Quantization.FP8_DYNAMIC}  # It packs no text encoder.
    if offload is not Offload.NONE and others:
        raise StartupError(
            f"--offload {offload} goes with --quantize {source.id}=fp8, and not with "
            f"{', '.join(sorted(map(str, others)))}"
        )
    if source.quantize is None or source.quantize.kind is Quantization.FP8:
        return
    kind = source.quantize.kind
    if not files.index:
        raise StartupError(
            f"--quantize {source.id}={kind}: a single file cannot be quantised; give a pipeline's "
            "folder, or use fp8"
        )
    if source.quantize.file is not None:
        _check_gguf(files, Path(source.quantize.file).expanduser())


def _check_float8(option: str, files: "ModelFiles", runtime: Runtime) -> None:
    instead = f"use --quantize {files.source.id}=fp8, which only stores weights in 8 bits"
    hardware = Hardware.of(runtime.device)
    if hardware.capability is None:
        raise StartupError(
            f"{option} needs a GPU with CUDA of compute capability 8.9 or later, and the models "
            f"run on {runtime.device}; {instead}"
        )
    if hardware.capability < FLOAT8:
        raise StartupError(
            f"{option} needs compute capability 8.9 or later, and {runtime.device} has "
            f"{hardware.version}; {instead}"
        )
    if runtime.autocast:
        raise StartupError(f"{option} does not go with --autocast; leave that out")
    if files.source.quantize is not None and runtime.dtype is not torch.bfloat16:
        raise StartupError(
            f"{option} needs bfloat16, and the model runs in {runtime.dtype_name}; add --dtype "
            "bfloat16"
        )


def _check_gguf(files: "ModelFiles", file: Path) -> None:
    option = f"--quantize {files.source.id}=gguf:{file}"
    if not file.is_file():
        raise StartupError(f"{option}: no such file")
    denoiser = component_class(files.index.get(files.family.denoiser_name))
    if not hasattr(denoiser, "from_single_file"):
        raise StartupError(
            f"{option}: diffusers reads no such file of a {files.family.pipeline_class}"
        )


def own_quantization(folder: Path, part: str) -> Quantization | None:
    """How the files of ``part`` are quantised already; None if they are not.

    Raises ``StartupError`` for a method that is not supported.
    """
    file = folder / part / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError):
        return None  # Not there, or damaged: the load says so.
    if not config:
        return None
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise StartupError(
            f"its {part} is quantised by {method!r}, which is not supported; give the model's "
            "other files, and --quantize"
        )
    if method == "torchao" and "Float8DynamicActivation" in json.dumps(config.get("quant_type")):
        return Quantization.FP8_DYNAMIC
    return METHODS[method]


def quantized_options(
    files: "ModelFiles", part: str, made_by: type, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` with which ``part`` is quantised; {} if it is not."""
    quantize = files.source.quantize
    if quantize is None or not is_quantized_part(files, part):
        return {}
    library: Any = diffusers if issubclass(made_by, diffusers.ModelMixin) else transformers
    if quantize.kind is Quantization.INT8:
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": library.TorchAoConfig(Int8WeightOnlyConfig())}
    if quantize.kind is Quantization.FP8_DYNAMIC:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        # A scale for each token: one for the tensor would let a row change the others' images.
        scaled = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        return {"quantization_config": library.TorchAoConfig(scaled)}
    if quantize.kind is Quantization.NF4:
        config = library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        return {"quantization_config": config}
    return {}


def gguf_denoiser(files: "ModelFiles", part: str, made_by: Any, dtype: torch.dtype) -> Any:
    """The denoiser of a GGUF file; None if ``part`` comes from the model's own files."""
    quantize = files.source.quantize
    if quantize is None or quantize.file is None or part != files.family.denoiser_name:
        return None
    return made_by.from_single_file(
        str(Path(quantize.file).expanduser()),
        config=str(files.path),
        subfolder=part,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    ).eval()


def is_packed(files: "ModelFiles", part: str) -> bool:
    """Whether a quantiser packs the weights of ``part``, or has packed its files."""
    return is_quantized_part(files, part) or own_quantization(files.path, part) is not None


def is_quantized_part(files: "ModelFiles", part: str) -> bool:
    """Whether ``--quantize`` is for ``part``: the denoiser, and by some kinds the text encoders."""
    quantize = files.source.quantize
    if quantize is None:
        return False
    encoders = quantize.kind in (Quantization.INT8, Quantization.NF4)
    is_encoder = part.startswith("text_encoder")
    return part == files.family.denoiser_name or (encoders and is_encoder)


def quantization_of(files: "ModelFiles") -> str:
    """What ``GetModel`` and the record say: a kind such as "int8", "gguf:FILE", or ""."""
    quantize = files.source.quantize
    if quantize is None:
        own = {own_quantization(files.path, part) for part in files.parts} - {None}
        return ", ".join(sorted(str(kind) for kind in own))
    if quantize.file is None:
        return quantize.kind.value
    return f"{quantize.kind}:{Path(quantize.file).name}"
