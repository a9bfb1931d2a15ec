"""Adds models to a running loop, and removes them from it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.events import AdapterLoaded, Event
from darkroom_server.core.model_events import ModelLoaded, ModelUnloaded
from darkroom_server.core.residency import sharing
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.adapters.store import AdapterStore
from darkroom_server.engine.batching.residency import Residency
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.batching.runner import Runner
from darkroom_server.engine.batching.scheduler import BatchScheduler
from darkroom_server.engine.catalogue.global_settings import LoopPaused
from darkroom_server.engine.catalogue.loader import ModelLoader, ModelRead
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.forms.compiler import Compiler
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.loading.load_model import LoadedModel
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache
from darkroom_server.ipc.commands import DescribeModels, LoadModel, UnloadModel

log = structlog.get_logger(__name__)

ModelChange = LoadModel | UnloadModel | DescribeModels | ModelRead | LoopPaused


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts:
    """What of a loop knows its models; the mappings and the set are shared with it."""

    runner: Runner
    scheduler: BatchScheduler
    residency: Residency
    row_limits: dict[str, RowLimits]
    caches: dict[str, MeasurementCache]
    adapters: AdapterStore
    adaptable: dict[str, ModelAdapters]
    encode_slowly: set[str]
    compiler: Compiler | None


@dataclass(slots=True)
class ResidentModels:
    """The models of a loop, which ``loader`` loads; used from the loop's thread only.

    ``receive`` passes a change to that thread.
    """

    parts: LoopParts
    loader: ModelLoader
    receive: Callable[[ModelChange], None]
    emit: Callable[[Event], None]
    _unloading: dict[str, bool] = field(default_factory=dict)
    _to_load: dict[bool, LoadModel] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether ``work`` has something to do."""
        return self.loader.busy or any(forms.to_record is not None for forms in self._forms)

    @property
    def waiting(self) -> bool:
        """Whether something is to be unloaded, or loaded after that."""
        return bool(self._unloading or self._to_load)

    def handle(self, change: ModelChange) -> None:
        """Begin a change, or go on with one."""
        match change:
            case LoadModel():
                self._to_load[change.host_only] = change
            case UnloadModel(id, keep):
                self._unloading[id] = keep
            case DescribeModels():
                self.loader.describe(change, self.receive)
            case ModelRead():
                self.loader.finish(change)
            case LoopPaused():
                change.hold()

    def settle(self) -> None:
        """Unload what no job uses any more; then begin the loads that wait for it."""
        for id in self._unloading.keys() - self.parts.scheduler.models_in_use:
            self._remove(id, keep=self._unloading.pop(id))
        if not self._unloading:
            commands, self._to_load = self._to_load, {}
            for command in commands.values():
                self.loader.begin(command, self.receive)

    def work(self) -> None:
        """Record a graph, or do a part of a load, and add the model once it is complete.

        Raises an error that means that the device is lost.
        """
        for forms in self._forms:
            forms.record_pending()
        loaded = self.loader.work()
        if loaded is not None:
            self._add(loaded)

    def account_for_graphs(self) -> None:
        """Leave to batches what is left after the graphs that were recorded since the last call."""
        taken = sum(forms.take_graph_bytes() for forms in self._forms)
        if not taken:
            return
        for model in self.parts.runner.models.values():
            model.info = sharing(model.info, max(0, model.info.memory.available_bytes - taken))
        self._pass_memory_on()

    @property
    def _forms(self) -> list[DenoiserForms]:
        models = self.parts.runner.models.values()
        return [model.forms for model in models if model.forms is not None]

    def _add(self, loaded: LoadedModel) -> None:
        parts, model = self.parts, loaded.model
        id = model.info.id
        self.loader.add(id, loaded)
        parts.runner.models[id] = model
        parts.caches[id] = loaded.cache
        parts.row_limits[id] = RowLimits.of_model(model.info)
        parts.runner.add(id)
        if model.adapters is not None:
            parts.adaptable[id] = model.adapters
        if model.encodes_slowly:
            parts.encode_slowly.add(id)
        if parts.compiler is not None:
            parts.compiler.prepare(model, beside_jobs=True)
        free = self._share_memory()
        self.emit(ModelLoaded(info=model.info, load=loaded.load, free_bytes=free))
        for offer in model.info.adapters:
            if offer.kind is AdapterKind.CONTROLNET:
                self.emit(AdapterLoaded(id, offer.id, offer.bytes, loaded.load.load_seconds))

    def _remove(self, id: str, *, keep: bool) -> None:
        if id in self.parts.runner.models:
            self._withdraw(id)
        kept = self.loader.discard(id, keep=keep)
        free = self._share_memory()
        log.info("model unloaded", model=id, free_bytes=free, host_bytes=kept)
        self.emit(ModelUnloaded(model=id, free_bytes=free, host_bytes=kept))

    def _withdraw(self, id: str) -> None:
        """Let the loop serve a model no more."""
        parts = self.parts
        parts.adapters.forget(id)
        if parts.compiler is not None:
            parts.compiler.forget(id)
        parts.runner.remove(id)
        parts.residency.remove(id)
        for known in (parts.runner.models, parts.caches, parts.row_limits, parts.adaptable):
            known.pop(id, None)
        parts.encode_slowly.discard(id)

    def _share_memory(self) -> int:
        """Let every model know what memory is left; returns that."""
        free = available_bytes(self.loader.device)
        for forms in self._forms:
            forms.take_graph_bytes()  # They are not free any more.
        for model in self.parts.runner.models.values():
            model.info = sharing(model.info, free)
        self._pass_memory_on()
        return free

    def _pass_memory_on(self) -> None:
        """Let the limits of batches and of unfinished images know what memory is left."""
        for id, model in self.parts.runner.models.items():
            self.parts.row_limits[id].memory = model.info.memory
            self.parts.residency.set(model.info)
