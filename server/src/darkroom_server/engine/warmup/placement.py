"""Brings a pipeline into its format, and measures what it takes on its device."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers import AutoencoderKL

from darkroom_server.core.engine_config import Attention
from darkroom_server.core.errors import StartupError
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.core.residency import HEADROOM
from darkroom_server.engine.catalogue.slices import between_batches, pause
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import DECODE_FAILED, OUT_OF_MEMORY, is_out_of_memory
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.warmup.profiler import peak_bytes, seconds_of
from darkroom_server.engine.warmup.row_measurement import TimeBatch, agreed_seconds


def convert(family: Family, runtime: Runtime, done: Collection[str] = ()) -> MemoryFormat:
    """Bring the pipeline into the format of ``runtime``; returns that format.

    The weights of the components in ``done`` have it already.
    """
    pipeline = family.pipeline
    if runtime.attention is Attention.SLICED:
        _slice_attention(pipeline, runtime.slice_size)
    if runtime.vae_tiling:
        tile(family)
    memory_format = memory_format_of(family, runtime)
    _convert(pipeline, memory_format.dtype, done)
    if vae_is_upcast(pipeline):
        family.vae.to(dtype=torch.float32)
    if memory_format.channels_last and family.denoiser_name not in done:
        family.denoiser.to(memory_format=torch.channels_last)
    if vae_is_channels_last(family, runtime) and "vae" not in done:
        family.vae.to(memory_format=torch.channels_last)
    return memory_format


def tile(family: Family) -> None:
    """Decode by tiles of about three quarters of the model's default size, on each side.

    diffusers' own tiles are at least as large as the default size, so it would not be tiled.
    """
    vae = family.vae
    if not hasattr(vae, "enable_tiling"):
        return
    vae.enable_tiling()
    # A multiple of four: tiles overlap by a quarter, and must meet.
    latent_size = max(4, family.size // family.latent_factor * 3 // 16 * 4)
    vae.tile_latent_min_size = latent_size
    vae.tile_sample_min_size = latent_size * family.latent_factor


def memory_format_of(family: Family, runtime: Runtime) -> MemoryFormat:
    """The format in which ``runtime`` stores the weights of ``family``."""
    return MemoryFormat(runtime.dtype, runtime.channels_last and family.convolutional)


def vae_is_channels_last(family: Family, runtime: Runtime) -> bool:
    """Whether ``runtime`` stores the VAE of ``family`` channels last.

    The VAE's own rule is for what was measured: the usual class, in the model's dtype, on a CPU.
    Others are stored as the denoiser; those of videos cannot be stored channels last at all.
    """
    if (
        runtime.device.type == "cpu"
        and isinstance(family.vae, AutoencoderKL)
        and not vae_is_upcast(family.pipeline)
    ):
        return runtime.vae_channels_last
    return memory_format_of(family, runtime).channels_last


def _convert(pipeline: Any, dtype: torch.dtype, done: Collection[str]) -> None:
    """Convert the components that were not loaded in ``dtype``, but those of ``done``.

    The others keep in float32 what their libraries keep there, as T5 in float16 some weights, and
    rotary embeddings their frequencies: a conversion of the pipeline would round them.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and part.dtype != dtype and name not in done:
            part.to(dtype=dtype)


def vae_is_upcast(pipeline: Any) -> bool:
    """Whether the VAE runs in float32 and without autocast: in half precision images are black.

    diffusers' pipelines with ``upcast_vae`` convert the VAE for each image and back. Here it stays
    in float32: samples share it.
    """
    return hasattr(pipeline, "upcast_vae") and bool(pipeline.vae.config.force_upcast)


def denoiser_timer(family: Family, memory_format: MemoryFormat, runtime: Runtime) -> TimeBatch:
    """A function that runs the denoiser once on random rows, and returns its seconds.

    It raises ``MemoryError`` if they do not fit.
    """

    def time_batch(rows: int) -> float:
        try:
            inputs = family.denoiser_inputs(
                rows, memory_format.dtype, runtime.device, memory_format.layout
            )
            with runtime.precision(memory_format.dtype):
                return seconds_of(runtime.device, lambda: family.denoiser(**inputs))
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise

    return time_batch


def measure_memory(
    time_batch: TimeBatch,
    family: Family,
    decoder: Decoder,
    memory_format: MemoryFormat,
    runtime: Runtime,
) -> MemoryNeeds:
    """The memory that a batch and a decode take at the default size."""
    if runtime.device.type == "cuda":
        time_batch(1)  # In the first call libraries allocate memory that they keep.
    once = 0
    pause()
    if family.unbatched_reason:
        bytes_per_row = peak_bytes(runtime.device, lambda: time_batch(1))
    else:
        two_rows = peak_bytes(runtime.device, lambda: time_batch(2))
        if runtime.attention is Attention.SLICED:
            # A slice has the same size for any number of rows.
            pause()
            one_row = peak_bytes(runtime.device, lambda: time_batch(1))
            once = min(max(0, 2 * one_row - two_rows), two_rows)
        bytes_per_row = (two_rows - once) // 2
    pause()
    decode = _decode_once(family, decoder, memory_format, runtime)
    decode_peak = peak_bytes(runtime.device, decode)
    return MemoryNeeds(
        pixels=family.size**2,
        bytes_per_row=bytes_per_row + family.kept_bytes_per_row,
        bytes_per_pass=once,
        bytes_per_decode=decode_peak,
        tile_pixels=decoder.tile_pixels,
        bytes_per_sample=sample_bytes(family),
        available_bytes=available_bytes(runtime.device),
    )


def sample_bytes(family: Family) -> int:
    """Bytes that an unfinished image of the default size holds between its batches."""
    return math.ceil(HEADROOM * family.bytes_per_sample)


def measure_decode(
    family: Family, decoder: Decoder, memory_format: MemoryFormat, runtime: Runtime
) -> float:
    """Seconds of the decode of one image of the default size, 0 if the model has no VAE."""
    if family.vae is None:
        return 0.0
    decode = _decode_once(family, decoder, memory_format, runtime)
    return agreed_seconds(between_batches(lambda: seconds_of(runtime.device, decode)))


def measure_encode(family: Family, runtime: Runtime) -> float:
    """Seconds of the encode of one prompt, 0 if the family cannot measure it."""
    if not family.encode_prompt():  # Also warms up.
        return 0.0
    return agreed_seconds(between_batches(lambda: seconds_of(runtime.device, family.encode_prompt)))


def _decode_once(
    family: Family, decoder: Decoder, memory_format: MemoryFormat, runtime: Runtime
) -> Callable[[], None]:
    """A function that decodes one image of the default size.

    It raises if it fails, because a failed decode measures nothing.
    """
    if family.vae is None:
        return lambda: None
    latents = family.latents(memory_format.dtype, runtime.device)

    def decode() -> None:
        found = decoder.decode_scaled(latents, family.decode_options)
        if found is OUT_OF_MEMORY:
            raise MemoryError(OUT_OF_MEMORY.message)
        if found is DECODE_FAILED:
            raise StartupError("the model's VAE cannot decode; the log above says why")

    return decode


def _slice_attention(pipeline: Any, size: str) -> None:
    try:
        pipeline.enable_attention_slicing(int(size) if size.isdecimal() else size)
    except ValueError as error:
        # A number applies to every layer, and no layer may have fewer heads.
        raise StartupError(
            f"--slice-size {size} is more than the fewest heads of a layer of this model; use a "
            "smaller one, auto or max"
        ) from error
