"""Loads models beside running jobs: reads on a thread of its own, measures between batches."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import Event
from darkroom_server.core.model_events import ModelInHost, ModelNotLoaded, ModelsDescribed
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.describe import Catalogue
from darkroom_server.engine.catalogue.fetching import fetch_reported
from darkroom_server.engine.catalogue.global_settings import LoopPaused, exclusive_settings
from darkroom_server.engine.catalogue.slices import SlicedWork, pause
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.device.malloc import return_freed_memory
from darkroom_server.engine.failures import is_fatal, one_line
from darkroom_server.engine.forms.adapted_graphs import record_adapted_later
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.graphs import Recorder, record_graphs
from darkroom_server.engine.forms.reshaped_graphs import record_reshaped_later
from darkroom_server.engine.loading.findings import Findings
from darkroom_server.engine.loading.load_model import LoadedModel, finish_model
from darkroom_server.engine.loading.read_model import (
    HostRead,
    NoMemory,
    ReadModel,
    read_into_host,
    read_model,
)
from darkroom_server.engine.weights.store import WeightStore
from darkroom_server.ipc.channel import ChannelClosed
from darkroom_server.ipc.commands import DescribeModels, LoadModel

log = structlog.get_logger(__name__)

SWITCH_SECONDS = 0.0002
"""While a model is read: how long Python lets that thread run before the loop's thread may.

Each call of torch releases the interpreter's lock and takes it again, a thousand times in a batch.
"""


@dataclass(frozen=True, slots=True)
class ModelRead:
    """What a reading thread found: the model, or why it could not be read."""

    command: LoadModel
    model: ReadModel | HostRead | None
    error: Exception | None = None


class ModelLoader:
    """One load at a time, and beside it one read into the host's memory.

    Used from the loop's thread but for the reads. One that fails emits ``ModelNotLoaded``.
    ``loading`` is the id of the model that is being loaded. ``store`` has the weights of models,
    ``findings`` is what loads found so far. ``first_image`` generates one image of a new model on a
    GPU, with ``pause`` between its batches. ``new_recorder`` is called for each model.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        controlnets: ControlNets,
        new_recorder: Callable[[], Recorder],
        store: WeightStore,
        emit: Callable[[Event], None],
        first_image: Callable[[LoadedModel], None],
    ) -> None:
        self.device = device
        self.loading = ""
        self.store = store
        self.findings = Findings()
        self._modules: dict[str, tuple[torch.nn.Module, ...]] = {}
        self._forms: dict[str, DenoiserForms | None] = {}
        # The server runs by then: a model is not to blame for an adapter.
        self._config = replace(config, adapters_may_fail=True)
        self._controlnets = controlnets
        self._new_recorder = new_recorder
        self._emit = emit
        self._first_image = first_image
        self._finishing: SlicedWork | None = None
        self._reading = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether ``work`` has something to do."""
        return self._finishing is not None

    def begin(self, command: LoadModel, receive: Callable[[ModelRead | LoopPaused], None]) -> None:
        """Start to read a model, onto its device or into the host's memory."""
        id = command.source.id
        if not command.host_only:
            self.loading = id
        log.info("model is being loaded", model=id, host_only=command.host_only)
        # A thread for each load: OpenMP keeps a pool for every thread that computes.
        threading.Thread(
            target=self._read, args=[command, receive], name="read-model", daemon=True
        ).start()

    def describe(
        self, command: DescribeModels, receive: Callable[[ModelRead | LoopPaused], None]
    ) -> None:
        """Describe models beside the jobs, after a model that is being read."""
        threading.Thread(
            target=self._describe, args=[command, receive], name="describe-models", daemon=True
        ).start()

    def finish(self, read: ModelRead) -> None:
        """Let ``work`` warm up a model that was read, or keep it in the host's memory.

        Raises an error of a lost device.
        """
        id, model = read.command.source.id, read.model
        if read.error is not None:
            self._fail(id, read.error)
            return
        if isinstance(model, HostRead):
            kept = self.store.add_to_host(id, model.held) if model.held is not None else 0
            self._emit(ModelInHost(load=replace(model.load, host_bytes=kept)))
            return
        assert model is not None
        config = self._config_for(read.command)
        self._finishing = SlicedWork(lambda: self._finish(model, config))

    def work(self) -> LoadedModel | None:
        """Do a part of a load that takes no longer than a batch; returns a model that is ready.

        Raises an error that means that the device is lost.
        """
        if self._finishing is None:
            return None
        try:
            if not self._finishing.run():
                return None
        except Exception as error:  # noqa: BLE001 - it is contained, or raised again.
            self._finishing = None
            self._fail(self.loading, error)
            return None
        loaded: LoadedModel = self._finishing.result
        self._finishing = None
        self.loading = ""
        return loaded

    def add(self, id: str, loaded: LoadedModel) -> None:
        """A model serves jobs from now on."""
        self._modules[id] = loaded.modules
        self._forms[id] = loaded.model.forms
        self.store.add(id, loaded.held)

    def discard(self, id: str, *, keep: bool) -> int:
        """Free the weights of a model that serves no job any more; those that others share stay.

        They are taken from their modules, and the graphs from the forms: these may be parts of
        cycles that live on for a while. ``keep``: the host's memory keeps the weights. Returns the
        bytes that it keeps.
        """
        if (forms := self._forms.pop(id, None)) is not None:
            forms.drop_others()
        for module in self._modules.pop(id, ()):
            module.to(device="meta")
        kept = self.store.remove(id, keep=keep)
        _release_memory(self.device)
        return kept

    def _finish(self, read: ReadModel, config: EngineConfig) -> LoadedModel:
        loaded = finish_model(read, config, self._controlnets, self.findings)
        pause()
        loaded = with_graphs(loaded, self._new_recorder())
        if self.device.type == "cuda":
            pause()
            self._first_image(loaded)
        return loaded

    def _read(self, command: LoadModel, receive: Callable[[ModelRead | LoopPaused], None]) -> None:
        try:
            with (
                self._reading if self._reads_files(command) else nullcontext(),
                fetch_reported(command.source, self._emit),
                _short_switches,
                exclusive_settings(receive),
                _own_stream(self.device),
                torch.inference_mode(),
            ):
                model = self._read_as(command)
        except Exception as error:  # noqa: BLE001 - see below.
            # Whatever it is, the model is at fault, and the loop goes on.
            receive(ModelRead(command, None, error))
        else:
            receive(ModelRead(command, model))

    def _reads_files(self, command: LoadModel) -> bool:
        """Whether a load needs the disk: a copy from the host's memory goes on beside it."""
        return command.host_only or self.store.held(command.source.id) is None

    def _read_as(self, command: LoadModel) -> ReadModel | HostRead:
        config = self._config_for(command)
        if command.host_only:
            return read_into_host(command.source, config, self.store)
        adapters = Adapters.of(config)
        return read_model(command.source, config, adapters, self.store, keep=command.keep)

    def _describe(
        self, command: DescribeModels, receive: Callable[[ModelRead | LoopPaused], None]
    ) -> None:
        # What was measured of an earlier model of a name says nothing about its new files.
        config = replace(self._config, adapters=command.adapters, previous_measurements=())
        with (
            self._reading,
            _short_switches,
            exclusive_settings(receive),
            torch.inference_mode(),
            suppress(ChannelClosed),  # The serving process is gone.
        ):
            catalogue = Catalogue(config, self.device, Adapters.of(config), self._controlnets)
            self._emit(ModelsDescribed(catalogue.describe_all(command.sources)))

    def _config_for(self, command: LoadModel) -> EngineConfig:
        previous = (command.previous,) if command.previous is not None else ()
        return replace(self._config, adapters=command.adapters, previous_measurements=previous)

    def _fail(self, id: str, error: Exception) -> None:
        if is_fatal(error):
            raise error
        if id == self.loading:
            self.loading = ""
        if not isinstance(error, StartupError):
            log.error("model could not be loaded", model=id, exc_info=error)
        # Tracebacks hold the weights that were read.
        for each in (error, error.__cause__, error.__context__):
            if each is not None:
                each.__traceback__ = None
        gc.collect()
        self.store.end_read(id)
        _release_memory(self.device)
        why = str(error) if isinstance(error, StartupError) else one_line(error)
        log.warning("model not loaded", model=id, why=why)
        self._emit(ModelNotLoaded(model=id, reason=why, out_of_memory=isinstance(error, NoMemory)))


def with_graphs(loaded: LoadedModel, recorder: Recorder) -> LoadedModel:
    """``loaded``, with the graphs of its denoiser if it has such a form."""
    graph_bytes = record_graphs(loaded.model, recorder)
    record_adapted_later(loaded.model)
    record_reshaped_later(loaded.model, recorder)
    if not graph_bytes:
        return loaded
    parts = {**loaded.load.bytes_by_component, "graphs": graph_bytes}
    return replace(loaded, load=replace(loaded.load, bytes_by_component=parts))


def _release_memory(device: torch.device) -> None:
    """Give freed memory back to the device, so that another model can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()


class _ShortSwitches:
    """While at least one model is read, threads run for ``SWITCH_SECONDS`` at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_SECONDS)
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                sys.setswitchinterval(self._usual)


_short_switches = _ShortSwitches()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Copy to a GPU beside the kernels of batches; the copies are complete at the end."""
    if device.type != "cuda":
        with nullcontext():
            yield
        return
    torch.cuda.set_device(device)
    stream: Any = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
