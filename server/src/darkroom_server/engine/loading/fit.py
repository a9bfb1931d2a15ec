"""Whether a model's weights fit its device, from the headers of its files: nothing is loaded."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from darkroom_server.core.errors import StartupError
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.loading.pipeline import ModelFiles, failed
from darkroom_server.engine.warmup.presets import Runtime

INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Bytes of the types that safetensors names and that stay as they are; all others are floats."""

TRAINING_ONLY = "model_ema."
"""How the names of averaged weights start, which single files may hold and nothing loads."""


def check_weights_fit(
    files: ModelFiles, runtime: Runtime, error: type[StartupError] = StartupError
) -> tuple[int, int]:
    """The bytes of the weights as ``runtime`` stores them, and the bytes that are available.

    Raises ``error`` if the weights do not fit the device.
    """
    needed, available = weight_bytes(files, runtime), available_bytes(runtime.device)
    if needed > available:
        raise error(
            f"model {files.source.location!r} does not fit the memory of {runtime.device}: its "
            f"weights need {needed} bytes in {runtime.dtype_name}, and {available} bytes are "
            "available; use a smaller --dtype, --preset tiny, or fewer models"
        )
    return needed, available


def weight_bytes(files: ModelFiles, runtime: Runtime) -> int:
    """The bytes of the weights of ``files`` once they are loaded as ``runtime`` says.

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
        # Files of variants and shards of one part repeat names, or share them out.
        found = (files.path / part).glob("*model*.safetensors")
        in_eight_bits = runtime.fp8_storage and part == files.family.denoiser_name
        size = 1 if in_eight_bits else runtime.dtype.itemsize
        total += _bytes_of(files, part, sorted(found), size)
    return total


def _bytes_of(files: ModelFiles, part: str, paths: Iterable[Path], float_bytes: int) -> int:
    """The bytes of ``part``, whose files are ``paths``, with floats of ``float_bytes``."""
    sizes: dict[str, int] = {}
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
    return sum(size for name, size in sizes.items() if not name.startswith(TRAINING_ONLY))
