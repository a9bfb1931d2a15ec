"""The memory format of a model: dtype and layout, by a rule and never by a measurement.

Two servers on equal machines choose equal formats, and so does a server that starts again: the
bytes of `exact` images depend on the format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from darkroom_server.core.engine_config import Preset

CPUINFO = Path("/proc/cpuinfo")

TENSOR_CORES = (7, 0)
"""The first CUDA compute capability whose tensor cores take float16 channels last (Volta)."""

BFLOAT16 = (8, 0)
"""The first CUDA compute capability that computes in bfloat16 (Ampere)."""


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """How the denoiser's weights are stored in memory."""

    dtype: torch.dtype
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        """The layout of four-dimensional tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} channels_last" if self.channels_last else dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfPrecision:
    """How a family's models run in half precision; the risks are reasons, "" if there is none.

    ``dtype`` is the one of a GPU. ``float16_risk``: why weights in float16 may fail.
    ``autocast_risk``: why autocast may do harm. ``slices_attention``: diffusers can slice the
    denoiser's attention.
    """

    dtype: torch.dtype = torch.float16
    float16_risk: str = ""
    autocast_risk: str = ""
    slices_attention: bool = True


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the rule looks at.

    ``cpu_flags`` are the instruction sets that torch may use, as Linux names them. ``capability``
    is the CUDA compute capability, None on a CPU.
    """

    cpu_flags: frozenset[str] = frozenset()
    capability: tuple[int, int] | None = None

    @property
    def is_gpu_without_bfloat16(self) -> bool:
        """Whether it is a GPU on which torch only emulates bfloat16."""
        return self.capability is not None and self.capability < BFLOAT16

    @property
    def version(self) -> str:
        """The compute capability as NVIDIA writes it, such as "9.0"."""
        return ".".join(map(str, self.capability or ()))

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """The hardware of ``device``."""
        if device.type == "cuda":
            return cls(capability=torch.cuda.get_device_capability(device))
        flags = _cpu_flags()
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            # ATEN_CPU_CAPABILITY can forbid what the CPU has.
            flags = frozenset(f for f in flags if not f.startswith(("avx512", "amx")))
        return cls(cpu_flags=flags)


@dataclass(frozen=True, slots=True)
class FormatRule:
    """What the rule chooses for a machine; ``reason`` is for the operator."""

    dtype: torch.dtype
    channels_last: bool
    reason: str


def format_rule(preset: Preset, hardware: Hardware, half: HalfPrecision) -> FormatRule:
    """The dtype and layout of ``preset``, which is not AUTO, on ``hardware``.

    A GPU without bfloat16 runs a family of it in float16 if no risk of that is known, else in
    float32.

    On a CPU with bfloat16 instructions, the demo model's denoiser takes 0.6 to 0.8 of the CPU time
    in bfloat16 (AMD EPYC with AVX-512 BF16, 2 to 16 rows; layouts differ by less than 10 %, and
    contiguous is ahead). Without them, bfloat16 is emulated. AMX takes matrices channels last.
    """
    fast = preset.is_fast
    if hardware.capability is not None:
        tensor_cores = hardware.capability >= TENSOR_CORES
        dtype, reason = _dtype_on_gpu(preset, hardware, half, tensor_cores)
        return FormatRule(
            dtype,
            channels_last=fast and tensor_cores,
            reason=f"{reason} (compute capability {hardware.version})",
        )
    # float16 is never chosen: on a CPU it is hundreds of times slower.
    if not fast:
        return FormatRule(
            torch.bfloat16, channels_last=False, reason=f"preset {preset} on a CPU saves memory"
        )
    if "amx_bf16" in hardware.cpu_flags:
        return FormatRule(torch.bfloat16, channels_last=True, reason="the CPU has amx_bf16")
    if "avx512_bf16" in hardware.cpu_flags:
        return FormatRule(torch.bfloat16, channels_last=False, reason="the CPU has avx512_bf16")
    return FormatRule(
        torch.float32,
        channels_last=False,
        reason="the CPU has no bfloat16 instructions that torch uses",
    )


def vae_channels_last(
    preset: Preset, hardware: Hardware, dtype: torch.dtype, denoiser: bool
) -> bool:
    """Whether ``preset`` stores a VAE in ``dtype`` channels last.

    As the ``denoiser``, with one exception: on a CPU with AVX-512 BF16, a VAE in bfloat16 decodes
    in 0.84 to 0.88 of the time if it is channels last, and the denoiser is faster contiguous. In
    float32 the demo model's VAE gained as much, and that of Stable Diffusion 1.4 nothing
    (``python -m bench.micro vae_layout``). On GPUs nothing was measured.
    """
    faster = dtype is torch.bfloat16 and "avx512_bf16" in hardware.cpu_flags
    return denoiser or (preset.is_fast and faster)


def _dtype_on_gpu(
    preset: Preset, hardware: Hardware, half: HalfPrecision, tensor_cores: bool
) -> tuple[torch.dtype, str]:
    if half.dtype is torch.float16:
        which = "with" if tensor_cores else "without"
        return torch.float16, f"preset {preset} on a GPU {which} tensor cores"
    why = half.float16_risk or "transformers run in bfloat16"
    if not hardware.is_gpu_without_bfloat16:
        return torch.bfloat16, f"{why}, and the GPU has bfloat16"
    if half.float16_risk:
        return torch.float32, f"{why}, and the GPU has no bfloat16"
    return torch.float16, "the GPU has no bfloat16, and the model holds in float16"


def cpu_name() -> str:
    """The CPU's name as Linux reports it, "" if it does not."""
    return _cpuinfo("model name")


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """The value of ``field`` for the first CPU; "" if there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
