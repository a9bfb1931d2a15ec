"""Putting a pipeline on its device, in its fastest form, and measuring what it takes there."""

from typing import Any

import torch

from darkroom_server.core.engine_config import Attention
from darkroom_server.core.errors import StartupError
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import DECODE_FAILED, OUT_OF_MEMORY
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.warmup.profiler import (
    DenoiserForward,
    MemoryFormat,
    fastest_format,
    fastest_of,
    peak_bytes,
)


def arrange(
    pipeline: Any, runtime: Runtime, tokens: int, previous_measurements: MemoryFormat | None
) -> MemoryFormat:
    """Put the pipeline on its device in the form that the knobs, or its own speed, ask for.

    ``tokens`` are those of a prompt. ``previous_measurements`` is a form that was measured before.
    """
    if runtime.attention is Attention.SLICED:
        _slice_attention(pipeline, runtime.slice_size)
    if runtime.vae_tiling:
        _tile(pipeline)
    # Never float16 where nothing was said: on a CPU it is hundreds of times slower.
    dtypes = [runtime.dtype] if runtime.dtype else [torch.float32, torch.bfloat16]
    layouts = [False, True] if runtime.channels_last is None else [runtime.channels_last]
    form = previous_measurements or fastest_format(
        pipeline.unet,
        [MemoryFormat(dtype, layout) for dtype in dtypes for layout in layouts],
        lambda unet, form: denoiser_forward(unet, form, runtime, tokens),
    )
    pipeline.to(dtype=form.dtype)
    if form.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if runtime.fp8_storage:
        pipeline.unet.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=form.dtype
        )
    # Last: the smallest devices have room for the smallest form only.
    pipeline.to(device=runtime.device)
    return form


def denoiser_forward(
    unet: Any, form: MemoryFormat, runtime: Runtime, tokens: int
) -> DenoiserForward:
    """A pass over zeros: what it computes does not matter, what it costs does."""
    latent = int(unet.config.sample_size)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format

    def forward(rows: int) -> None:
        shape = (rows, unet.config.in_channels, latent, latent)
        latents = torch.zeros(shape, dtype=form.dtype, device=runtime.device)
        context = torch.zeros(
            (rows, tokens, unet.config.cross_attention_dim), dtype=form.dtype, device=runtime.device
        )
        with runtime.precision(form.dtype):
            unet(
                latents.contiguous(memory_format=layout),
                torch.zeros(rows, device=runtime.device),
                encoder_hidden_states=context,
            )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    return forward


def measure_memory(
    forward: DenoiserForward,
    unet: Any,
    decoder: Decoder,
    form: MemoryFormat,
    runtime: Runtime,
    factor: int,
) -> MemoryNeeds:
    """What a pass and a decode take at the default size; ``factor`` pixels make one latent."""
    latents = _blank(unet, form, runtime)
    if runtime.device.type == "cuda":
        forward(1)  # The first one has libraries take memory that they keep.
    two_rows = peak_bytes(runtime.device, lambda: forward(2))
    once = 0
    if runtime.attention is Attention.SLICED:
        # Slices are of the same size for any number of rows.
        one_row = peak_bytes(runtime.device, lambda: forward(1))
        once = min(max(0, 2 * one_row - two_rows), two_rows)
    decode_peak = peak_bytes(runtime.device, lambda: _decode(decoder, latents))
    return MemoryNeeds(
        pixels=(latents.shape[-1] * factor) ** 2,
        bytes_per_row=(two_rows - once) // 2,
        bytes_per_pass=once,
        bytes_per_decode=decode_peak,
        tile_pixels=decoder.tile_pixels,
        available_bytes=available_bytes(runtime.device),
    )


def measure_decode(unet: Any, decoder: Decoder, form: MemoryFormat, runtime: Runtime) -> float:
    """Seconds of the decode of one image of the default size."""
    latents = _blank(unet, form, runtime)
    return fastest_of(2, lambda: _decode(decoder, latents))


def _decode(decoder: Decoder, latents: torch.Tensor) -> None:
    """Decode what is to be measured: an attempt that failed says nothing of others."""
    found = decoder.decode(latents)
    if found is OUT_OF_MEMORY:
        raise MemoryError(OUT_OF_MEMORY.message)
    if found is DECODE_FAILED:
        raise StartupError("the model's VAE cannot decode; the log above says why")


def _blank(unet: Any, form: MemoryFormat, runtime: Runtime) -> torch.Tensor:
    """The latents of one image of the default size."""
    latent = int(unet.config.sample_size)
    shape = (1, int(unet.config.in_channels), latent, latent)
    return torch.zeros(shape, dtype=form.dtype, device=runtime.device)


def _tile(pipeline: Any) -> None:
    """Decode by tiles of about three quarters of the model's own size, each side.

    diffusers' tiles are as large as that, or larger: an image of the usual size would not be tiled.
    """
    pipeline.vae.enable_tiling()
    # A multiple of four: a quarter overlaps, or the tiles would not meet.
    latent = max(4, int(pipeline.unet.config.sample_size) * 3 // 16 * 4)
    pipeline.vae.tile_latent_min_size = latent
    pipeline.vae.tile_sample_min_size = latent * pipeline.vae_scale_factor


def _slice_attention(pipeline: Any, size: str) -> None:
    try:
        pipeline.enable_attention_slicing(int(size) if size.isdecimal() else size)
    except ValueError as error:
        # A number goes for every layer, and no layer may have fewer heads.
        raise StartupError(
            f"--slice-size {size} is more than the fewest heads of a layer of this model; use a "
            "smaller one, auto or max"
        ) from error
