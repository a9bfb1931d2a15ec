"""Brings a model's weights onto its device: from its files, or from the host's memory."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.core.quantization import Quantization
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.fetching import cached_bytes
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import is_out_of_memory
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.loading.defaults import read_defaults
from darkroom_server.engine.loading.fit import check_weights_fit, weight_bytes
from darkroom_server.engine.loading.model_info import set_size
from darkroom_server.engine.loading.offloading import offload, offloaded_parts
from darkroom_server.engine.loading.pipeline import ModelFiles, failed, find_model, load_pipeline
from darkroom_server.engine.loading.quantization import (
    check_quantization,
    quantization_of,
)
from darkroom_server.engine.loading.revision import UNKNOWN, revision_of
from darkroom_server.engine.warmup.eight_bits import store_in_eight_bits
from darkroom_server.engine.warmup.placement import convert, tile, vae_is_upcast
from darkroom_server.engine.warmup.presets import Runtime, resolve
from darkroom_server.engine.weights.parts import Part
from darkroom_server.engine.weights.store import (
    HeldModel,
    WeightStore,
    without_modules,
)
from darkroom_server.engine.weights.stored import is_quantized

log = structlog.get_logger(__name__)


HOST = torch.device("cpu")


class NoMemory(StartupError):
    """The model does not fit what the device, or the host, has left now."""


@dataclass(slots=True, kw_only=True)
class ReadModel:
    """A model whose weights are on its device, and that was not called yet.

    ``held``: what a later load needs. ``loras`` are the adapters that fit it. ``began`` and
    ``in_memory`` are monotonic seconds, the begin and the end of the read. ``needed`` bytes of
    ``available`` are those of its weights.
    """

    held: HeldModel
    previous: ModelInfo | None
    family: Family
    safety: SafetyChecker | None
    loras: tuple[AdapterOffer, ...]
    takes_loras: bool
    origin: WeightOrigin
    needed: int
    available: int
    began: float
    in_memory: float

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which a component is called."""
        return self.held.runtime.precision(self.held.memory_format.dtype)

    def vae_precision(self) -> AbstractContextManager[Any]:
        """The context in which the VAE is called."""
        return nullcontext() if vae_is_upcast(self.family.pipeline) else self.precision()


def files_of(
    source: ModelSource, config: EngineConfig, previous: ModelInfo | None
) -> tuple[ModelFiles, Runtime]:
    """The files of ``source``, and how the model will run. Raises ``StartupError``."""
    if previous is not None and previous.revision not in ("", UNKNOWN):
        # The same weights, even if the hub has newer ones now.
        source = replace(source, revision=previous.revision)
    files = find_model(source, safety_checker=config.safety_checker)
    half = files.family.half
    if files.ip_adapter is not None:
        # Sliced attention would replace the attention that reads the image.
        half = replace(half, slices_attention=False)
    quantization = quantization_of(files)
    if Quantization.FP8_DYNAMIC in quantization.split(", "):
        # The packed weights of a linear layer take its inputs as they come.
        half = replace(half, autocast_risk="products in 8-bit floats need inputs in bfloat16")
    runtime = resolve(config, half)
    check_quantization(files, runtime)
    return files, replace(
        runtime,
        quantization=quantization,
        # The preset's is for weights that nothing else has packed.
        fp8_storage=quantization == Quantization.FP8 or (runtime.fp8_storage and not quantization),
    )


def read_model(
    source: ModelSource,
    config: EngineConfig,
    adapters: Adapters,
    store: WeightStore,
    *,
    keep: bool = False,
) -> ReadModel:
    """The model of ``source``, its weights on its device.

    They come from the host's memory if ``store`` has them there, else from files, but for parts
    that another model has on the device. ``keep``: the host's memory holds them too. ``adapters``
    record which of them fit the model. Raises ``StartupError``, which is a ``NoMemory`` if the
    device has too little memory now.
    """
    began, cached = time.monotonic(), cached_bytes(source)
    previous = next((info for info in config.previous_measurements if info.id == source.id), None)
    held, origin = store.held(source.id), WeightOrigin.HOST
    if held is not None:
        needed, available = _check_host_fits(held)
        with explained(held.files, held.runtime, needed, available):
            family = _from_host(held, source)
    else:
        files, runtime = files_of(source, config, previous)
        for risk in runtime.risks:
            log.warning("a setting is risky for this model", model=source.id, why=risk)
        keys, present = _keys(files, runtime, store)
        needed, available = check_weights_fit(files, runtime, NoMemory, present)
        with explained(files, runtime, needed, available):
            held, family = _from_files(files, runtime, keys, present, keep=keep)
        origin = WeightOrigin.HUB if cached_bytes(source) > cached else WeightOrigin.DISK
    in_memory = time.monotonic()
    if previous is not None and previous.revision != held.revision:
        previous = None  # Other files may be those of another architecture.
    adaptable = held.runtime.takes_adapters
    return ReadModel(
        held=held,
        previous=previous,
        family=family,
        safety=family.safety_checker(source.location) if config.safety_checker else None,
        loras=adapters.offer(source.id, family, held.memory_format.dtype) if adaptable else (),
        takes_loras=adaptable and adapters.may_fit(family),
        origin=origin,
        needed=needed,
        available=available,
        began=began,
        in_memory=in_memory,
    )


@dataclass(frozen=True, slots=True)
class HostRead:
    """A model whose weights were read into the host's memory, and what that took.

    ``held`` is None if it cannot be kept there.
    """

    held: HeldModel | None
    load: ModelLoad


def read_into_host(source: ModelSource, config: EngineConfig, store: WeightStore) -> HostRead:
    """The model of ``source``, its weights in the host's memory, from where a load copies them.

    They come from its files, but for parts that another model has. A model that a quantiser packs
    is not read: modules cannot be made of its weights again. Raises ``StartupError``, which is a
    ``NoMemory`` if the host has too little memory now.
    """
    began, cached = time.monotonic(), cached_bytes(source)
    previous = next((info for info in config.previous_measurements if info.id == source.id), None)
    files, runtime = files_of(source, config, previous)
    held = None
    if runtime.quantization in ("", Quantization.FP8.value):
        keys, present = _keys(files, runtime, store, on_host=True)
        needed = weight_bytes(files, runtime, present)
        available = available_bytes(HOST)
        if needed > available:
            raise NoMemory(
                f"model {source.location!r} does not fit the host's memory: its weights need "
                f"{needed} bytes, and {available} bytes are available"
            )
        with explained(files, runtime, needed, available):
            held, _ = _from_files(files, runtime, keys, present, keep=True, host_only=True)
    parts = held.parts if held is not None else {}
    return HostRead(
        held,
        ModelLoad(
            model=source.id,
            load_seconds=time.monotonic() - began,
            warm_up_seconds=0.0,
            bytes_by_component={name: part.bytes for name, part in parts.items()},
            origin=WeightOrigin.HUB if cached_bytes(source) > cached else WeightOrigin.DISK,
            shared=held.shared if held is not None else {},
            stamp=held.stamp if held is not None else "",
        ),
    )


def _keys(
    files: ModelFiles, runtime: Runtime, store: WeightStore, *, on_host: bool = False
) -> tuple[dict[str, str], dict[str, Part]]:
    try:
        return store.find(files, runtime, on_host=on_host)
    except OSError as error:
        raise failed(files.source, "the model", error) from error


def _from_files(
    files: ModelFiles,
    runtime: Runtime,
    keys: Mapping[str, str],
    present: Mapping[str, Part],
    *,
    keep: bool,
    host_only: bool = False,
) -> tuple[HeldModel, Family]:
    """The model of ``files``, on its device or ``host_only`` in the host's memory."""
    source, device = files.source, runtime.device
    stamp = stamp_of(files.path)
    modules = {
        name: part.borrowed() if host_only else part.module(device)
        for name, part in present.items()
    }
    pipeline = load_pipeline(files, runtime.dtype, modules)
    family = family_of(pipeline)
    family.check_pipeline(source.location)
    defaults = read_defaults(source, family.model_defaults)
    set_size(source.location, family, defaults.size)
    read = {
        name: module
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module) and name not in present
    }
    packed = {name for name, module in read.items() if is_quantized(module)}
    memory_format = convert(family, runtime, {*present, *packed})
    offloaded = offloaded_parts(family, runtime)
    parts = {
        name: Part(module, keys.get(name, ""), offloaded=name in offloaded)
        for name, module in read.items()
    }
    # Hooks of eight-bit storage belong to a module, and are not for its copies. The weights get
    # their last type before they move: a small device has no room for them in their first one.
    if runtime.fp8_storage:
        store_in_eight_bits(family.denoiser, memory_format.dtype)
    for name, part in parts.items():
        if host_only:
            part.take_into_host(read[name], device)
        else:
            part.take(read[name], device, keep=keep)
    if keep and device.type != "cpu":
        for part in present.values():
            part.keep()
    if not host_only:
        offload(family, runtime)
    held = HeldModel(
        pipeline=without_modules(pipeline),
        parts={**parts, **present},
        files=files,
        runtime=runtime,
        defaults=defaults,
        memory_format=memory_format,
        revision=revision_of(source, pipeline),
        stamp=stamp,
    )
    return held, family


def _from_host(held: HeldModel, source: ModelSource) -> Family:
    family = family_of(held.new_pipeline(held.runtime.device))
    set_size(source.location, family, held.defaults.size)
    if held.runtime.vae_tiling:
        tile(family)  # The VAE may be that of a model of another size.
    if held.runtime.fp8_storage:
        store_in_eight_bits(family.denoiser, held.memory_format.dtype)
    offload(family, held.runtime)
    return family


def _check_host_fits(held: HeldModel) -> tuple[int, int]:
    """The bytes to copy to the device, and those that it has. Raises ``NoMemory``."""
    device = held.runtime.device
    if device.type == "cpu":
        return 0, available_bytes(device)  # They are in its memory.
    needed = sum(part.bytes for part in held.parts.values() if part.device_weights is None)
    if needed > (available := available_bytes(device)):
        raise NoMemory(
            f"model {held.files.source.location!r} does not fit the memory of {device}: its "
            f"weights need {needed} bytes, and {available} bytes are available"
        )
    return needed, available


@contextmanager
def explained(files: ModelFiles, runtime: Runtime, needed: int, available: int) -> Iterator[None]:
    """Raise ``NoMemory`` in place of an allocation's error."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        source = files.source
        log.warning("out of memory", model=source.id, why=str(error))
        raise NoMemory(
            f"model {source.location!r} does not fit the memory of {runtime.device}: its weights "
            f"need {needed} of {available} available bytes, and one image does not fit the rest; "
            "use --preset tiny, or fewer models"
        ) from error
