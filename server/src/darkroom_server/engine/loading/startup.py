"""From a configuration to a loop that is ready to run."""

import time
from collections.abc import Callable, Iterable

import structlog
import torch

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import AdapterLoaded, EngineReady, Event
from darkroom_server.core.residency import sharing
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.describe import Catalogue
from darkroom_server.engine.catalogue.loader import ModelLoader, with_graphs
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.compiler import Compiler
from darkroom_server.engine.forms.graphs import CudaRecorder, Recorder
from darkroom_server.engine.forms.toolchain import Inductor, Toolchain
from darkroom_server.engine.loading.first_images import generate_first_image, generate_first_images
from darkroom_server.engine.loading.load_model import load_model
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.engine.warmup.presets import allowed_threads, device_of, unused_gpu
from darkroom_server.engine.weights.store import WeightStore

log = structlog.get_logger(__name__)


def start_loop(
    config: EngineConfig,
    emit: Callable[[Event], None],
    toolchain: Toolchain | None = None,
    new_recorder: Callable[[], Recorder] = CudaRecorder,
) -> tuple[EngineLoop, EngineReady]:
    """Load every model; must be called on the thread that will run the loop.

    ``toolchain`` compiles denoisers, None: torch's own. ``new_recorder`` makes what records the
    graphs of one. Raises ``StartupError`` with one line for the operator.
    """
    began = time.monotonic()
    device = device_of(config)
    if warning := unused_gpu(device, config):
        log.error(warning)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or allowed_threads())
    else:
        # CUDA events are recorded on the current device, which must be this engine's.
        torch.cuda.set_device(device)
    models, loads, caches = {}, [], {}
    adapters, controlnets = Adapters.of(config), ControlNets(config)
    compiler = Compiler(config.compile_cache, toolchain or Inductor())
    store = WeightStore(device)
    loader = ModelLoader(
        config, device, controlnets, new_recorder, store, emit, generate_first_image
    )
    for source in config.models:
        with torch.inference_mode():
            loaded = load_model(source, config, adapters, controlnets, store, loader.findings)
            loaded = with_graphs(loaded, new_recorder())
            compiler.prepare(loaded.model)
            _account_for_graphs(loaded.model)
        models[source.id], caches[source.id] = loaded.model, loaded.cache
        loader.add(source.id, loaded)
        loads.append(loaded.load)
    catalogue = Catalogue(config, device, adapters, controlnets)
    descriptions = catalogue.describe_all(config.catalogue)
    controlnets.check()
    if len(models) > 1:
        _share_memory(models.values(), config, device)
    if device.type == "cuda":
        generate_first_images(models, caches)
    infos = tuple(model.info for model in models.values())
    for info, load in zip(infos, loads, strict=True):
        for offer in info.adapters:
            if offer.kind is AdapterKind.CONTROLNET:
                # They are read with their model, and are never evicted.
                emit(AdapterLoaded(info.id, offer.id, offer.bytes, load.load_seconds))
    setup = adapters.setup()
    loop = EngineLoop(models, emit, caches, setup, compiler, loader)
    ready = EngineReady(
        infos,
        time.monotonic() - began,
        tuple(loads),
        descriptions=descriptions,
        free_bytes=available_bytes(device),
        host_free_bytes=None if device.type == "cpu" else available_bytes(torch.device("cpu")),
        device=str(device),
    )
    return loop, ready


def _account_for_graphs(model: Model) -> None:
    """Correct the available memory by what graphs took; an earlier engine may have done it."""
    if model.forms is not None and model.forms.take_graph_bytes():
        left = min(model.info.memory.available_bytes, available_bytes(model.device))
        model.info = sharing(model.info, left)


def _share_memory(models: Iterable[Model], config: EngineConfig, device: torch.device) -> None:
    """Correct each model's available memory by what the models loaded after it take."""
    previously_measured = {info.id for info in config.previous_measurements}
    available = available_bytes(device)
    for model in models:
        if model.info.id not in previously_measured:
            model.info = sharing(model.info, available)
