"""Loads one model in two parts: ``read_model`` brings it onto its device, the rest measures it.

The first part runs on any thread, the second on the one that runs batches.
"""

import time
from dataclasses import dataclass, replace

import structlog
import torch

from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.engine.adapters.offering import Adapters, model_adapters
from darkroom_server.engine.catalogue.slices import pause
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.offering import denoiser_forms
from darkroom_server.engine.loading.findings import Findings
from darkroom_server.engine.loading.model_info import model_info
from darkroom_server.engine.loading.pipeline import weights_of
from darkroom_server.engine.loading.read_model import ReadModel, explained, read_model
from darkroom_server.engine.warmup.measurement import measure, slices_get_finer
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache
from darkroom_server.engine.weights.store import HeldModel, WeightStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be served, the cache of its measurements, and the modules with weights.

    ``held``: what a later load needs, and what other models may share.
    """

    model: Model
    load: ModelLoad
    cache: MeasurementCache
    modules: tuple[torch.nn.Module, ...]
    held: HeldModel


def load_model(
    source: ModelSource,
    config: EngineConfig,
    adapters: Adapters,
    controlnets: ControlNets,
    store: WeightStore,
    findings: Findings,
) -> LoadedModel:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``.

    What an earlier engine of this server measured, or an earlier start, is not measured again.
    ``adapters`` and ``controlnets`` record which of them fit the model. ``store`` has the parts
    that other models hold; the caller adds this one. ``findings`` are those of all loads.
    """
    return finish_model(read_model(source, config, adapters, store), config, controlnets, findings)


def finish_model(
    read: ReadModel, config: EngineConfig, controlnets: ControlNets, findings: Findings
) -> LoadedModel:
    """The model that was ``read``, warmed up and measured, with ``pause`` between its calls.

    Raises ``StartupError``.
    """
    with explained(read.held.files, read.held.runtime, read.needed, read.available):
        return _finish(read, config, controlnets, findings)


def _finish(
    read: ReadModel, config: EngineConfig, controlnets: ControlNets, findings: Findings
) -> LoadedModel:
    family, held = read.family, read.held
    source, runtime, memory_format = held.files.source, held.runtime, held.memory_format
    pipeline = family.pipeline
    if held.files.ip_adapter is not None:
        family.ip_adapter = IpAdapter(pipeline, read.precision)
    family.prepare(memory_format, read.precision, config)
    pause()
    if read.takes_loras:
        family.adapters = model_adapters(
            family,
            memory_format,
            runtime.device,
            read.precision,
            config.max_loras,
            findings.row_layers,
        )
        pause()
    controls = controlnets.offer(source.id, family, memory_format, runtime, read.precision)
    if controls is not None:
        family.controls = controls.controls
    decoder = Decoder(family.vae, read.vae_precision)
    measured = measure(family, decoder, memory_format, runtime, config, read.previous)
    family.forms = denoiser_forms(
        source.id, family, memory_format, runtime, config, measured.max_rows
    )
    info = model_info(
        source.id,
        family,
        held.defaults,
        runtime,
        memory_format,
        config,
        revision=held.revision,
        memory=replace(
            measured.memory, control_bytes_per_row=controls.bytes_per_row if controls else 0
        ),
        max_rows=measured.max_rows,
        most_rows=measured.most_rows,
        source=measured.source,
        speed=measured.speed,
        offers={"loras": read.loras, "controls": controls.offers if controls else ()},
        takes_loras=family.adapters is not None,
        takes_ip_adapter=family.ip_adapter is not None,
    )
    log.info(
        "model loaded",
        model=info.id,
        kind=info.kind,
        revision=info.revision,
        device=info.runtime.device,
        dtype=info.runtime.dtype,
        memory_format=info.runtime.memory_format,
        vae_channels_last=info.runtime.vae_channels_last,
        format_rule=info.runtime.format_rule,
        preset=info.runtime.preset,
        preset_rule=info.preset_rule,
        attention=info.runtime.attention,
        autocast=info.runtime.autocast,
        max_rows=measured.max_rows,
        row_limit_source=measured.source,
        bytes_per_row=info.memory.bytes_per_row,
        bytes_per_decode=info.memory.bytes_per_decode,
    )
    model = family.new_model(
        info, memory_format, runtime.device, read.precision, decoder, read.safety
    )
    if slices_get_finer(runtime):
        model.attention = SlicedAttention(family.denoiser)
    if model.previewer is not None and read.safety is None:
        pause()
        vae = held.parts.get("vae")
        model.previewer.fit(findings.preview_maps, vae.key if vae is not None else "")
    load = ModelLoad(
        model=info.id,
        load_seconds=read.in_memory - read.began,
        warm_up_seconds=time.monotonic() - read.in_memory,
        bytes_by_component=weights_of(family),
        origin=read.origin,
        stamp=held.stamp,
        shared=held.shared,
        host_bytes=0 if runtime.device.type == "cpu" else held.host_bytes,
    )
    nets = controls.controls.nets.values() if controls is not None else ()
    modules = (each for each in (*pipeline.components.values(), *nets))
    weights = tuple(each for each in modules if isinstance(each, torch.nn.Module))
    return LoadedModel(model, load, measured.cache, weights, held)
