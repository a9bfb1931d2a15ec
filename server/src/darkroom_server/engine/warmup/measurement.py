"""Measures a placed model, or takes what an earlier start measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import structlog
import torch

from darkroom_server.core.engine_config import Attention, EngineConfig
from darkroom_server.core.model import MemoryNeeds, ModelInfo
from darkroom_server.core.model_runtime import ModelSpeed, RowLimitSource
from darkroom_server.core.quantization import Offload
from darkroom_server.engine.catalogue.slices import between_batches
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.formats import MemoryFormat, cpu_name
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache, Measurements
from darkroom_server.engine.warmup.placement import (
    denoiser_timer,
    measure_decode,
    measure_encode,
    measure_memory,
    sample_bytes,
    vae_is_channels_last,
)
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.warmup.profiler import peak_bytes
from darkroom_server.engine.warmup.row_measurement import (
    MAX_BATCH_SECONDS,
    ROWS,
    agreed_seconds,
    best_rows,
    measure_rows,
    row_counts,
)

log = structlog.get_logger(__name__)

LIBRARIES = ("darkroom-server", "diffusers", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The memory, row limit and speed of a model, and the cache that remembers them."""

    memory: MemoryNeeds
    max_rows: int
    most_rows: int
    source: RowLimitSource
    speed: ModelSpeed
    cache: MeasurementCache


def measure(
    family: Family,
    decoder: Decoder,
    memory_format: MemoryFormat,
    runtime: Runtime,
    config: EngineConfig,
    previous: ModelInfo | None,
) -> Measured:
    """The measurements of ``previous``, of the cache or of now; warms the model up too."""
    time_batch = denoiser_timer(family, memory_format, runtime)
    cache = MeasurementCache(
        config.measurement_cache, cache_key(family, memory_format, runtime, config)
    )
    # A sample whose calls are not merged is a batch of its own: a limit of one row keeps the
    # estimates from assuming otherwise.
    merged = not family.unbatched_reason
    least = 2 if merged else 1
    most = (config.rows or min(config.max_rows or max(ROWS), max(ROWS))) if merged else 1
    remembered = cache.load()
    if previous is not None:
        time_batch(least)
        return Measured(
            memory=previous.memory,
            max_rows=previous.limits.max_rows,
            most_rows=most,
            source=previous.limits.row_limit_source,
            speed=previous.speed,
            cache=cache,
        )
    if remembered is not None:
        time_batch(least)
        found, source = remembered, RowLimitSource.REMEMBERED
    else:
        found, source = (
            _measure_now(family, decoder, memory_format, runtime, config, most),
            RowLimitSource.MEASURED,
        )
        # A batch of seconds may be one of a busy machine, which each later start would believe. It
        # is read twice only, so a slow model loses little.
        if found.passes[0][1] <= MAX_BATCH_SECONDS:
            cache.save(found)
    memory = MemoryNeeds(
        pixels=family.size**2,
        bytes_per_row=found.bytes_per_row,
        bytes_per_pass=found.bytes_per_pass,
        bytes_per_decode=found.bytes_per_decode,
        tile_pixels=decoder.tile_pixels,
        bytes_per_sample=sample_bytes(family),
        available_bytes=available_bytes(runtime.device),
        heads_per_slice=_attention(family, runtime).heads_per_slice,
        sdpa_bytes_per_row=found.sdpa_bytes_per_row,
    )
    _log_gain(found)
    fit = memory.rows_that_fit(family.size, family.size)
    rows = config.rows if merged else 1
    if rows is not None and rows > fit:
        log.warning("fewer rows fit the memory than are set", rows=rows, fit=fit)
    return Measured(
        memory=memory,
        max_rows=rows or max(2, min(found.max_rows, most, fit)),
        most_rows=most,
        source=source if rows is None else RowLimitSource.SET,
        speed=ModelSpeed(passes=found.passes, decode=found.decode, encode=found.encode),
        cache=cache,
    )


def cache_key(
    family: Family, memory_format: MemoryFormat, runtime: Runtime, config: EngineConfig
) -> dict[str, Any]:
    """Everything that the measurements depend on.

    The components' configurations, not their weights: fine-tunes of one model share a key.
    """
    cuda = runtime.device.type == "cuda"
    return {
        "family": family.pipeline_class,
        "size": family.size,
        "components": {
            name: configuration(component)
            for name in family.components
            if (component := getattr(family.pipeline, name)) is not None
        },
        "device": torch.cuda.get_device_name(runtime.device) if cuda else cpu_name(),
        "instructions": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if cuda else torch.get_num_threads(),
        "format": str(memory_format),
        "attention": [runtime.attention, runtime.slice_size],
        "autocast": runtime.autocast,
        "vae_tiling": runtime.vae_tiling,
        "fp8_storage": runtime.fp8_storage,
        "rows": [config.rows, config.max_rows],
        "libraries": {name: version(name) for name in LIBRARIES},
        **_vae_layout(family, memory_format, runtime),
        **_stored(runtime),
    }


def _vae_layout(family: Family, memory_format: MemoryFormat, runtime: Runtime) -> dict[str, bool]:
    """The VAE's layout, if it is not the denoiser's: older measurements lack it."""
    channels_last = vae_is_channels_last(family, runtime)
    same = channels_last == memory_format.channels_last
    return {} if same else {"vae_channels_last": channels_last}


def _stored(runtime: Runtime) -> dict[str, str]:
    """How the weights are stored, if not as usual: older measurements lack it."""
    stored = {"quantization": runtime.quantization, "offload": runtime.offload.value}
    return {} if stored == {"quantization": "", "offload": Offload.NONE.value} else stored


def configuration(component: Any) -> dict[str, Any]:
    """The configuration, without what does not change the work: names, paths and versions."""
    config = component.config
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    ignored = ("transformers_version", "torch_dtype", "dtype")
    return {k: v for k, v in fields.items() if not k.startswith("_") and k not in ignored}


def _measure_now(
    family: Family,
    decoder: Decoder,
    memory_format: MemoryFormat,
    runtime: Runtime,
    config: EngineConfig,
    most: int,
) -> Measurements:
    time_batch = denoiser_timer(family, memory_format, runtime)
    memory = measure_memory(time_batch, family, decoder, memory_format, runtime)
    if family.unbatched_reason:
        counts: Sequence[int] = (1,)
    else:
        most = min(most, memory.rows_that_fit(family.size, family.size))
        counts = row_counts(most) if config.rows is None else sorted({2, most})
    seconds = measure_rows(between_batches(time_batch), counts)
    sdpa_bytes, sdpa_seconds = _measure_sdpa(family, memory_format, runtime)
    best = best_rows(seconds)
    log.info(
        "measured rows", best=best, milliseconds={r: round(s * 1000, 1) for r, s in seconds.items()}
    )
    return Measurements(
        max_rows=best,
        passes=tuple(seconds.items()),
        decode=measure_decode(family, decoder, memory_format, runtime),
        encode=measure_encode(family, runtime),
        bytes_per_row=memory.bytes_per_row,
        bytes_per_pass=memory.bytes_per_pass,
        bytes_per_decode=memory.bytes_per_decode,
        sdpa_bytes_per_row=sdpa_bytes,
        sdpa_seconds=sdpa_seconds,
    )


def slices_get_finer(runtime: Runtime) -> bool:
    """Whether the slices of attention follow the size of the images, on a GPU.

    A CPU has more memory. There they stay as they are, and so do the last bits of its images.
    """
    return runtime.attention is Attention.SLICED and runtime.device.type == "cuda"


def _attention(family: Family, runtime: Runtime) -> SlicedAttention:
    """The layers of the denoiser whose slices get finer, none if they do not."""
    return SlicedAttention(family.denoiser if slices_get_finer(runtime) else None)


def _measure_sdpa(
    family: Family, memory_format: MemoryFormat, runtime: Runtime
) -> tuple[int, float]:
    """Bytes of a row with SDPA in place of slices, and the seconds of two as preset fast runs them.

    (0, 0.0) if nothing is sliced.
    """
    attention = _attention(family, runtime)
    if not attention.heads_per_slice:
        return 0, 0.0
    sliced = denoiser_timer(family, memory_format, runtime)
    fast = denoiser_timer(family, memory_format, replace(runtime, autocast=False))
    with attention.replaced_by_sdpa():
        peak = peak_bytes(runtime.device, lambda: sliced(2))
        return max(1, peak // 2), agreed_seconds(lambda: fast(2))


def _log_gain(found: Measurements) -> None:
    """Say in one line what preset fast would gain."""
    rows, seconds = found.passes[0]
    if not found.sdpa_seconds or rows != 2:
        return
    peak = 2 * found.bytes_per_row + found.bytes_per_pass
    log.info(
        "preset fast would run a batch of two rows with less",
        time_ratio=round(found.sdpa_seconds / seconds, 2),
        memory_ratio=round(2 * found.sdpa_bytes_per_row / max(1, peak), 2),
    )
