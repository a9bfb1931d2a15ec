"""How a model runs: the presets, and the options that override them."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.device import cgroup
from darkroom_server.engine.warmup.formats import Hardware, format_rule

DTYPES = {
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Every option of ``EngineConfig`` resolved.

    ``format_rule`` says why ``dtype`` and ``channels_last`` were chosen, "" if both are configured.
    """

    device: torch.device
    preset: Preset
    dtype: torch.dtype
    attention: Attention
    slice_size: str
    autocast: bool
    vae_tiling: bool
    channels_last: bool
    format_rule: str
    fp8_storage: bool

    def precision(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """The context for each call of a model whose weights are ``dtype``."""
        if not self.autocast:
            return nullcontext()
        # Float32 weights are autocast to half precision, as in diffusers' own examples.
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=half if dtype == torch.float32 else dtype)


def resolve(config: EngineConfig) -> Runtime:
    """Resolve ``config`` for this machine. Raises ``StartupError`` if it cannot run here."""
    device = _device(config.device)
    cuda = device.type == "cuda"
    preset = config.preset
    if preset is Preset.AUTO:
        preset = Preset.FRUGAL if cuda else Preset.FAST
    frugal, fast, tiny = (preset is p for p in (Preset.FRUGAL, Preset.FAST, Preset.TINY))
    if config.dtype is Dtype.FLOAT16 and not cuda:
        raise StartupError(
            "float16 on a CPU is hundreds of times slower than bfloat16: use --dtype bfloat16, "
            "float32 or auto"
        )
    rule = format_rule(preset, Hardware.of(device))
    dtype = rule.dtype if config.dtype is Dtype.AUTO else DTYPES[config.dtype]
    configured = config.dtype is not Dtype.AUTO and config.channels_last is not None
    attention = config.attention or (Attention.SDPA if fast else Attention.SLICED)
    return Runtime(
        device=device,
        preset=preset,
        dtype=dtype,
        attention=attention,
        slice_size=_slice_size(config, attention, default="max" if tiny else "auto"),
        autocast=config.autocast if config.autocast is not None else frugal,
        vae_tiling=config.vae_tiling if config.vae_tiling is not None else tiny,
        channels_last=(
            rule.channels_last if config.channels_last is None else config.channels_last
        ),
        format_rule="" if configured else rule.reason,
        # Only on CUDA the saved memory is worth the time of the casts.
        fp8_storage=tiny and cuda,
    )


def allowed_threads() -> int:
    """The CPU cores that the cgroup and the affinity mask allow this process, at least 1."""
    cores, quota = len(os.sched_getaffinity(0)), cgroup.cores()
    return cores if quota is None else min(cores, max(1, int(quota)))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or bool(colon) != number.isdecimal()):
        raise StartupError(f"no device {name!r}: use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    # Checked here, because torch stores the index in eight bits.
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"device {name!r} is not there: torch sees {count} CUDA devices")
    return torch.device("cuda", index)


def _slice_size(config: EngineConfig, attention: Attention, default: str) -> str:
    if attention is Attention.SDPA:
        if config.slice_size is not None:
            raise StartupError("--slice-size goes with --attention sliced")
        return ""
    size = config.slice_size or default
    if size not in ("auto", "max") and not (size.isdecimal() and int(size) > 0):
        raise StartupError(f"slice size {size!r}: use auto, max or a positive number")
    return size
