"""Whether a model's weights fit its device, from the headers of its files: nothing is loaded."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Quantization
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.loading.pipeline import ModelFiles, failed
from darkroom_server.engine.loading.quantization import is_quantized_part
from darkroom_server.engine.warmup.presets import Runtime

INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Bytes of the types that safetensors names and that stay as they are; all others are floats."""

TRAINING_ONLY = "model_ema."
"""How the names of averaged weights start, which single files may hold and nothing loads."""


def check_weights_fit(
    files: ModelFiles,
    runtime: Runtime,
    error: type[StartupError] = StartupError,
    present: Collection[str] = (),
) -> tuple[int, int]:
    """The bytes of the weights as ``runtime`` stores them, and the bytes that are available.

    The components in ``present`` are on the device already. Raises ``error`` if the others do not
    fit it.
    """
    needed = weight_bytes(files, runtime, present)
    available = available_bytes(runtime.device)
    if needed > available:
        raise error(
            f"model {files.source.location!r} does not fit the memory of {runtime.device}: its "
            f"weights need {needed} bytes in {runtime.dtype_name}, and {available} bytes are "
            "available; use a smaller --dtype, --preset tiny, or fewer models"
        )
    return needed, available


def weight_bytes(files: ModelFiles, runtime: Runtime, without: Collection[str] = ()) -> int:
    """The bytes of the weights of ``files`` once they are loaded as ``runtime`` says.

    Those of the components in ``without`` are left out.

    Raises ``StartupError`` if a header cannot be read.
    """
    size = runtime.dtype.itemsize
    total = 0
    if files.ip_adapter is not None:
        total += _bytes_of(files, "IP-Adapter", [files.ip_adapter.weights], size)
        found = files.ip_adapter.encoder.glob("*model*.safetensors")
        total += _bytes_of(files, "image encoder", sorted(found), size)
    if not files.index:
        return total + _bytes_of(files, "weights", [files.path], size)
    for part in files.parts:
        if part in without:
            continue
        if part == files.family.denoiser_name and (file := _gguf_file(files)) is not None:
            total += file.stat().st_size  # It is in memory as it is on disk.
            continue
        # Files of variants and shards of one part repeat names, or share them out.
        found = (files.path / part).glob("*model*.safetensors")
        total += _bytes_of(files, part, sorted(found), _float_bytes(files, runtime, part))
    return total


def _float_bytes(files: ModelFiles, runtime: Runtime, part: str) -> float:
    """About the bytes of a weight of ``part``; of quantised ones, most are in linear layers."""
    quantize = files.source.quantize
    if quantize is not None and is_quantized_part(files, part):
        if quantize.kind in (Quantization.INT8, Quantization.FP8_DYNAMIC):
            return 1
        if quantize.kind is Quantization.NF4:
            return 0.5
    in_eight_bits = runtime.fp8_storage and part == files.family.denoiser_name
    return 1 if in_eight_bits else runtime.dtype.itemsize


def _gguf_file(files: ModelFiles) -> Path | None:
    quantize = files.source.quantize
    if quantize is None or quantize.file is None:
        return None
    return Path(quantize.file).expanduser()


def _bytes_of(files: ModelFiles, part: str, paths: Iterable[Path], float_bytes: float) -> int:
    """The bytes of ``part``, whose files are ``paths``, with floats of ``float_bytes``."""
    sizes: dict[str, float] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is not a dictionary.
                    header = opened.get_slice(name)
                    count = torch.Size(header.get_shape()).numel()
                    sizes[name] = count * INTEGERS.get(header.get_dtype(), float_bytes)
        except Exception as error:
            # safetensors raises errors of its own type, and those of the system.
            raise failed(files.source, f"its {part}", error) from error
    return int(sum(size for name, size in sizes.items() if not name.startswith(TRAINING_ONLY)))
