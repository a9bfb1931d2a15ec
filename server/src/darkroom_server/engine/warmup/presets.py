"""How a model runs: the presets, and the options that override them."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darkroom_server.core.engine_config import Attention, Compile, Dtype, EngineConfig, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Offload
from darkroom_server.engine.device import cgroup
from darkroom_server.engine.warmup.formats import (
    FormatRule,
    HalfPrecision,
    Hardware,
    format_rule,
    vae_channels_last,
)

GPU_NODES = ("nvidia[0-9]*", "kfd", "dxg")
"""What drivers of GPUs name their devices in ``/dev``: NVIDIA's, AMD's, and Windows's in WSL."""

DTYPES = {
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Every option of ``EngineConfig`` resolved for one model.

    ``preset_rule`` says why ``preset`` is in force, "" if it is configured, and what of it does not
    suit the model. ``channels_last`` is for a convolutional denoiser, ``vae_channels_last`` for a
    VAE that its own rule covers. ``format_rule`` says why they and ``dtype`` were chosen, "" if all
    are configured. ``half`` is the dtype of autocast for weights in float32. ``risks`` say what of
    the configuration may fail with this model, each in one line. ``compile``: when the denoiser is.
    ``graphs``: its kernels are recorded as graphs. ``quantization`` and ``offload``: those of
    ``ModelRuntime``.
    """

    device: torch.device
    preset: Preset
    dtype: torch.dtype
    attention: Attention
    slice_size: str
    autocast: bool
    half: torch.dtype
    vae_tiling: bool
    channels_last: bool
    vae_channels_last: bool
    preset_rule: str
    format_rule: str
    fp8_storage: bool
    risks: tuple[str, ...]
    compile: Compile
    graphs: bool
    quantization: str = ""
    offload: Offload = Offload.NONE

    @property
    def takes_adapters(self) -> bool:
        """Whether rows may have LoRA adapters: they read the layers' weights on the device."""
        return self.offload is not Offload.GROUP and not self.quantization.startswith("gguf")

    @property
    def dtype_name(self) -> str:
        """The name of ``dtype``, such as "float16"."""
        return str(self.dtype).removeprefix("torch.")

    def precision(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """The context for each call of a model whose weights are ``dtype``."""
        if not self.autocast:
            return nullcontext()
        # Float32 weights are autocast to half precision, as in diffusers' own examples.
        half = self.half if dtype == torch.float32 else dtype
        return torch.autocast(self.device.type, dtype=half)


def resolve(config: EngineConfig, half: HalfPrecision) -> Runtime:
    """Resolve ``config`` for this machine, and for a model of a family that runs as ``half`` says.

    What is configured is in force. A preset's attention, dtype and autocast are in force unless
    they do not suit the family. Raises ``StartupError`` if ``config`` cannot run here.
    """
    device = device_of(config)
    cuda = device.type == "cuda"
    preset = config.preset
    if preset is Preset.AUTO:
        preset = Preset.FRUGAL if cuda else Preset.FAST
    frugal, tiny = preset is Preset.FRUGAL, preset is Preset.TINY
    hardware = Hardware.of(device)
    rule = format_rule(preset, hardware, half)
    dtype = rule.dtype if config.dtype is Dtype.AUTO else DTYPES[config.dtype]
    attention = config.attention or (Attention.SLICED if frugal else Attention.SDPA)
    slice_size = _slice_size(config, attention, default="max" if tiny else "auto")
    autocast_risk = _autocast_risk(dtype, hardware, half)
    autocast = frugal and not autocast_risk if config.autocast is None else config.autocast
    unsuitable = []
    if attention is Attention.SLICED and not half.slices_attention:
        attention, slice_size = Attention.SDPA, ""
        if config.attention is None:
            unsuitable.append("attention is sdpa: the model's cannot be sliced")
    if frugal and autocast_risk and config.autocast is None:
        unsuitable.append(f"autocast is off: {autocast_risk}")
    if config.channels_last is None:
        own = rule.channels_last
        vae = vae_channels_last(preset, hardware, dtype, own)
    else:
        own = vae = config.channels_last
    chosen = unused_gpu(device, config) or f"the default on a {'GPU' if cuda else 'CPU'}"
    return Runtime(
        device=device,
        preset=preset,
        dtype=dtype,
        attention=attention,
        slice_size=slice_size,
        autocast=autocast,
        half=half.dtype if cuda else torch.bfloat16,
        vae_tiling=config.vae_tiling if config.vae_tiling is not None else tiny,
        channels_last=own,
        vae_channels_last=vae,
        preset_rule="; ".join([chosen] * (config.preset is Preset.AUTO) + unsuitable),
        format_rule=_format_reason(config, preset, rule),
        # Only on CUDA the saved memory is worth the time of the casts.
        fp8_storage=tiny and cuda,
        risks=_risks(config, hardware, half, autocast_risk),
        compile=config.compile or _compile(preset),
        graphs=cuda and preset is Preset.MAX,
        offload=config.offload,
    )


def allowed_threads() -> int:
    """The CPU cores that the cgroup and the affinity mask allow this process, at least 1."""
    cores, quota = len(os.sched_getaffinity(0)), cgroup.cores()
    return cores if quota is None else min(cores, max(1, int(quota)))


def _autocast_risk(dtype: torch.dtype, hardware: Hardware, half: HalfPrecision) -> str:
    """Why autocast may do harm to a model with weights of ``dtype``, "" if it does not."""
    if half.autocast_risk:
        return half.autocast_risk
    if half.dtype is torch.bfloat16 and dtype is torch.float16:
        return "in float16 it would undo what text encoders such as T5 compute in float32"
    if half.dtype is torch.bfloat16 and hardware.is_gpu_without_bfloat16:
        return "the GPU has no bfloat16"
    return ""


def _compile(preset: Preset) -> Compile:
    if preset is Preset.MAX:
        return Compile.BACKGROUND
    return Compile.CACHED if preset is Preset.FAST else Compile.OFF


def _format_reason(config: EngineConfig, preset: Preset, rule: FormatRule) -> str:
    """Why the dtype and the layout are those of ``rule``, as far as they are."""
    if config.dtype is Dtype.AUTO:
        return rule.reason
    return "" if config.channels_last is not None else f"the memory layout of preset {preset}"


def _risks(
    config: EngineConfig, hardware: Hardware, half: HalfPrecision, autocast_risk: str
) -> tuple[str, ...]:
    risks = []
    if config.dtype is Dtype.FLOAT16 and half.float16_risk:
        risks.append(f"--dtype float16: {half.float16_risk}")
    if config.dtype is Dtype.BFLOAT16 and hardware.is_gpu_without_bfloat16:
        risks.append(
            "--dtype bfloat16: the GPU has no bfloat16, and torch emulates it slowly (compute "
            f"capability {hardware.version})"
        )
    if not half.slices_attention and config.attention is Attention.SLICED:
        risks.append("--attention sliced: the model's attention cannot be sliced, sdpa is used")
    if config.autocast and autocast_risk:
        risks.append(f"--autocast: {autocast_risk}")
    return tuple(risks)


def device_of(config: EngineConfig) -> torch.device:
    """The device that ``config`` names. Raises ``StartupError`` if it cannot run there."""
    device = _device(config.device)
    if config.dtype is Dtype.FLOAT16 and device.type != "cuda":
        raise StartupError(
            "float16 on a CPU is hundreds of times slower than bfloat16: use --dtype bfloat16, "
            "float32 or auto"
        )
    return device


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


def unused_gpu(device: torch.device, config: EngineConfig) -> str:
    """Why ``auto`` chose the CPU of a machine with a GPU, in one line; "" if it did not."""
    nodes = [str(node) for pattern in GPU_NODES for node in sorted(Path("/dev").glob(pattern))]
    if config.device != "auto" or device.type == "cuda" or not nodes:
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        why = "this torch is built for CPUs only"
    else:
        why = "torch finds no driver that it can use"
    return f"{nodes[0]} is a GPU, and the models run on the CPU: {why}"


def _slice_size(config: EngineConfig, attention: Attention, default: str) -> str:
    if attention is Attention.SDPA:
        if config.slice_size is not None:
            raise StartupError("--slice-size goes with --attention sliced")
        return ""
    size = config.slice_size or default
    if size not in ("auto", "max") and not (size.isdecimal() and int(size) > 0):
        raise StartupError(f"slice size {size!r}: use auto, max or a positive number")
    return size
