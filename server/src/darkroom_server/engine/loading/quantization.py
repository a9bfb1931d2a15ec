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

if TYPE_CHECKING:
    from darkroom_server.engine.loading.pipeline import ModelFiles

PACKAGES = {
    Quantization.INT8: ("torchao", "int8"),
    Quantization.NF4: ("bitsandbytes", "nf4"),
    Quantization.GGUF: ("gguf", "gguf"),
}
"""The package that each kind needs, and the extra of darkroom-server that brings it."""

METHODS = {"torchao": Quantization.INT8, "bitsandbytes": Quantization.NF4}
"""By the name in a component's ``config.json``, for files that are quantised already."""


def check_quantization(files: "ModelFiles", device: torch.device, offload: Offload) -> None:
    """Raise ``StartupError`` if the model cannot be loaded as its source and its files ask for."""
    source = files.source
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
    others = kinds - {Quantization.FP8}
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
    asked = files.source.quantize is not None and is_quantized_part(files, part)
    return asked or own_quantization(files.path, part) is not None


def is_quantized_part(files: "ModelFiles", part: str) -> bool:
    """Whether ``--quantize`` of int8 and nf4 is for ``part``: the denoiser and text encoders."""
    return part == files.family.denoiser_name or part.startswith("text_encoder")


def quantization_of(files: "ModelFiles") -> str:
    """What ``GetModel`` and the record say: "int8", "fp8", "nf4", "gguf:FILE", or ""."""
    quantize = files.source.quantize
    if quantize is None:
        own = {own_quantization(files.path, part) for part in files.parts} - {None}
        return ", ".join(sorted(str(kind) for kind in own))
    if quantize.file is None:
        return quantize.kind.value
    return f"{quantize.kind}:{Path(quantize.file).name}"
