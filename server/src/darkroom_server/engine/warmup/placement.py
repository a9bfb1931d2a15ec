"""Places a pipeline on its device in its fastest format, and measures what it takes there."""

from typing import Any

import torch

from darkroom_server.core.engine_config import Attention
from darkroom_server.core.errors import StartupError
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import DECODE_FAILED, OUT_OF_MEMORY
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.warmup.profiler import (
    DenoiserForward,
    MemoryFormat,
    fastest_format,
    fastest_of,
    peak_bytes,
)


def place(family: Family, runtime: Runtime, measured: MemoryFormat | None) -> MemoryFormat:
    """Put the pipeline on its device, in the format that is configured or the fastest there.

    ``measured`` is the fastest format as an earlier engine of this server measured it.
    """
    pipeline = family.pipeline
    if runtime.attention is Attention.SLICED:
        _slice_attention(pipeline, runtime.slice_size)
    if runtime.vae_tiling:
        _tile(family)
    # float16 is never tried: on a CPU it is hundreds of times slower.
    dtypes = [runtime.dtype] if runtime.dtype else [torch.float32, torch.bfloat16]
    layouts = [False, True] if runtime.channels_last is None else [runtime.channels_last]
    memory_format = measured or fastest_format(
        family.denoiser,
        [MemoryFormat(dtype, layout) for dtype in dtypes for layout in layouts],
        lambda denoiser, memory_format: denoiser_forward(family, denoiser, memory_format, runtime),
    )
    pipeline.to(dtype=memory_format.dtype)
    if memory_format.channels_last:
        family.denoiser.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if runtime.fp8_storage:
        family.denoiser.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=memory_format.dtype
        )
    # Last: a small device has no room for the weights in their first format.
    pipeline.to(device=runtime.device)
    return memory_format


def denoiser_forward(
    family: Family, denoiser: Any, memory_format: MemoryFormat, runtime: Runtime
) -> DenoiserForward:
    """A function that calls ``denoiser`` on zeros, whose cost is that of any other values."""

    def forward(rows: int) -> None:
        inputs = family.denoiser_inputs(
            rows, memory_format.dtype, runtime.device, memory_format.layout
        )
        with runtime.precision(memory_format.dtype):
            denoiser(**inputs)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    return forward


def measure_memory(
    forward: DenoiserForward,
    family: Family,
    decoder: Decoder,
    memory_format: MemoryFormat,
    runtime: Runtime,
) -> MemoryNeeds:
    """The memory that a batch and a decode take at the default size."""
    latents = family.latents(memory_format.dtype, runtime.device)
    if runtime.device.type == "cuda":
        forward(1)  # In the first call libraries allocate memory that they keep.
    two_rows = peak_bytes(runtime.device, lambda: forward(2))
    once = 0
    if runtime.attention is Attention.SLICED:
        # A slice has the same size for any number of rows.
        one_row = peak_bytes(runtime.device, lambda: forward(1))
        once = min(max(0, 2 * one_row - two_rows), two_rows)
    decode_peak = peak_bytes(runtime.device, lambda: _decode(decoder, latents))
    return MemoryNeeds(
        pixels=family.size**2,
        bytes_per_row=(two_rows - once) // 2,
        bytes_per_pass=once,
        bytes_per_decode=decode_peak,
        tile_pixels=decoder.tile_pixels,
        available_bytes=available_bytes(runtime.device),
    )


def measure_decode(
    family: Family, decoder: Decoder, memory_format: MemoryFormat, runtime: Runtime
) -> float:
    """Seconds of the decode of one image of the default size."""
    latents = family.latents(memory_format.dtype, runtime.device)
    return fastest_of(2, lambda: _decode(decoder, latents))


def _decode(decoder: Decoder, latents: torch.Tensor) -> None:
    """Decode for a measurement; raises if it fails, because a failed decode measures nothing."""
    found = decoder.decode(latents)
    if found is OUT_OF_MEMORY:
        raise MemoryError(OUT_OF_MEMORY.message)
    if found is DECODE_FAILED:
        raise StartupError("the model's VAE cannot decode; the log above says why")


def _tile(family: Family) -> None:
    """Decode by tiles of about three quarters of the model's default size, on each side.

    diffusers' own tiles are at least as large as the default size, so it would not be tiled.
    """
    vae = family.pipeline.vae
    vae.enable_tiling()
    # A multiple of four: tiles overlap by a quarter, and must meet.
    latent_size = max(4, family.latent_size * 3 // 16 * 4)
    vae.tile_latent_min_size = latent_size
    vae.tile_sample_min_size = latent_size * family.latent_factor


def _slice_attention(pipeline: Any, size: str) -> None:
    try:
        pipeline.enable_attention_slicing(int(size) if size.isdecimal() else size)
    except ValueError as error:
        # A number applies to every layer, and no layer may have fewer heads.
        raise StartupError(
            f"--slice-size {size} is more than the fewest heads of a layer of this model; use a "
            "smaller one, auto or max"
        ) from error
