"""Which other forms a model's denoiser can have, and what is needed to make them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog
import torch

from darkroom_server.core.engine_config import Attention, Compile, EngineConfig
from darkroom_server.core.quantization import Offload
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.graphs import buckets_up_to, compiled_buckets
from darkroom_server.engine.forms.signature import (
    EXAMPLE_ROWS,
    FEWER_ROWS,
    Kinds,
    OtherArguments,
    Signature,
    described,
    dtype_name,
    kinds_of,
)
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.pipelines.arguments import Arguments
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.measurement import configuration
from darkroom_server.engine.warmup.presets import Runtime

log = structlog.get_logger(__name__)

NO_CACHE = "results are kept on disk, and --no-measurement-cache forbids that"
"""Why nothing is compiled."""


def denoiser_forms(
    name: str,
    family: Family,
    memory_format: MemoryFormat,
    runtime: Runtime,
    config: EngineConfig,
    max_rows: int,
) -> DenoiserForms | None:
    """The forms of the denoiser of model ``name``, None if it always runs eagerly; logs why.

    A batch has at most about ``max_rows`` rows.
    """
    if runtime.compile is Compile.OFF and not runtime.graphs:
        return None
    try:
        if reason := _why_eager(family, runtime, config):
            raise OtherArguments(reason)
        if runtime.compile is not Compile.OFF and config.compile_cache is None:
            log.warning("graphs are of the eager denoiser", model=name, why=NO_CACHE)
            runtime = replace(runtime, compile=Compile.OFF)
        return _forms(family, memory_format, runtime, max_rows)
    except OtherArguments as error:
        asked = runtime.graphs or runtime.compile in (Compile.BACKGROUND, Compile.BLOCKING)
        (log.warning if asked else log.debug)("denoiser stays eager", model=name, why=str(error))
        return None


def _forms(
    family: Family, memory_format: MemoryFormat, runtime: Runtime, max_rows: int
) -> DenoiserForms:
    """Raises ``OtherArguments`` if only the eager denoiser takes the arguments of its calls."""

    def inputs(rows: int) -> Arguments:
        return family.denoiser_inputs(
            rows, memory_format.dtype, runtime.device, memory_format.layout
        )

    kinds = kinds_of(inputs(FEWER_ROWS), inputs(EXAMPLE_ROWS))
    forms = DenoiserForms(
        denoiser=family.denoiser,
        dtype=memory_format.dtype,
        signature=Signature(kinds, memory_format.layout),
        inputs=inputs,
        when=runtime.compile,
    )
    compiled_rows: Sequence[int | None] = [None]
    if runtime.graphs:
        forms.graph_rows = buckets_up_to(max_rows)
        compiled_rows = compiled_buckets(forms.graph_rows)
    if runtime.compile is not Compile.OFF:
        forms.tasks = tuple(
            _task(family.denoiser, kinds, memory_format, runtime.device, rows)
            for rows in compiled_rows
        )
    return forms


def _task(
    denoiser: Any,
    kinds: Kinds,
    memory_format: MemoryFormat,
    device: torch.device,
    rows: int | None,
) -> CompileTask:
    weights = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    description = {
        "module": type(denoiser).__module__,
        "class": type(denoiser).__qualname__,
        "config": configuration(denoiser),
        "dtype": dtype_name(memory_format.dtype),
        # What its library keeps in another type than the rest.
        "other_dtypes": {
            name: dtype_name(weight.dtype)
            for name, weight in weights.items()
            if weight.dtype != memory_format.dtype
        },
        "channels_last": memory_format.channels_last,
        "arguments": {name: described(kind) for name, kind in kinds.items()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "rows": rows,
    }
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability()
        description["gpu"] = [name, *capability, torch.version.cuda]
    try:
        gpu = (device.index or 0) if device.type == "cuda" else None
        return CompileTask(json.dumps(description), kinds, rows, gpu)
    except TypeError as error:
        raise OtherArguments(f"its configuration is not plain data ({error})") from error


def _why_eager(family: Family, runtime: Runtime, config: EngineConfig) -> str:
    """Why the denoiser always runs eagerly, "" if it need not."""
    if runtime.attention is not Attention.SDPA or runtime.autocast:
        return "it needs --attention sdpa and --no-autocast, as with --preset fast"
    if family.ip_adapter is not None:
        return "it has an IP-Adapter"
    if runtime.quantization:
        return f"its weights are stored in {runtime.quantization}"
    if runtime.offload is Offload.GROUP:
        return "its weights are offloaded"
    if family.unbatched_reason:
        return family.unbatched_reason
    if runtime.graphs:
        return ""
    if runtime.device.type != "cpu":
        return "on a GPU denoisers are compiled under graphs only: use --preset max"
    if config.compile_cache is None:
        return NO_CACHE
    return ""
