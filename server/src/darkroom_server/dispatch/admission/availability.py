"""Whether the server accepts jobs at all, and the error if it does not."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum, auto

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.catalog import ModelDescription
from darkroom_server.core.errors import (
    InvalidRequest,
    ModelUnusable,
    NotReady,
    Reason,
    UnknownModel,
    Violation,
)
from darkroom_server.core.events import Correction
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.adapters import AdapterStatus, adapters_of
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.load_times import LoadTimes
from darkroom_server.dispatch.observer import Observer, ReadyChanged

LOADING_RETRY_SECONDS = 2.0
"""Loading takes seconds to minutes; asking this often costs nothing."""

LONGEST_LOADING_RETRY_SECONDS = 30.0
"""The last load is an estimate: this one may be faster."""

AWAY_RETRY_SECONDS = 1.0
"""If this server shuts down, another one may take the call at once."""


class State(Enum):
    """Whether jobs are accepted (READY, RECOVERING) and run (READY)."""

    LOADING = auto()
    READY = auto()
    RECOVERING = auto()
    DRAINING = auto()


class Availability:
    """The server's state as callers see it, and the models that it holds.

    ``model_ids`` are the configured models, in their order. ``on_state`` is called with the state
    when it may have changed. ``load_times``: how long a load takes. ``restoring``: the jobs that an
    earlier server accepted are not all taken up yet, so no others are accepted. ``failures``: why a
    model cannot be loaded, by id. ``models`` has what is known of each model, in memory or not.
    """

    def __init__(
        self,
        model_ids: Iterable[str],
        pool: EnginePool,
        observer: Observer,
        on_state: Callable[[State], None],
        load_times: LoadTimes,
    ) -> None:
        self.models: dict[str, ModelInfo | None] = dict.fromkeys(model_ids)
        self._pool = pool
        self._observer = observer
        self._on_state = on_state
        self._load_times = load_times
        self._loaded = asyncio.Event()
        self._failed = asyncio.Event()
        self._failure = ""
        self._draining = False
        self.restoring = False
        self.failures: dict[str, str] = {}
        self._withdrawn: set[str] = set()
        self._removed: set[str] = set()

    @property
    def state(self) -> State:
        """The state now. A server without engines is on its way out too."""
        if self._draining or self._failed.is_set():
            return State.DRAINING
        if self.restoring or not self._loaded.is_set():
            return State.LOADING
        return State.READY if self._pool.ready else State.RECOVERING

    @property
    def adapters(self) -> list[AdapterStatus]:
        """The adapters of all loaded models, by id."""
        resident = [key for engine in self._pool.engines for key in engine.adapters]
        return adapters_of(self.models, resident)

    def resolve(self, asked: str) -> str:
        """The id of the model that a request means; "" means the only one.

        Raises ``UnknownModel``, or ``InvalidRequest`` if "" is ambiguous.
        """
        known = list(self.models)
        if asked in self.models:
            return asked
        if asked:
            raise UnknownModel(asked[:256], known)
        if len(known) != 1:
            violation = Violation("model", f"must be set, to one of {', '.join(known)}")
            raise InvalidRequest([violation])
        return known[0]

    def model(self, model_id: str) -> ModelInfo:
        """The model ``model_id``, in memory or not.

        Raises ``UnknownModel``, ``NotReady``, or ``ModelUnusable`` for one that cannot be loaded.
        """
        if model_id not in self.models:
            raise UnknownModel(model_id, list(self.models))
        if self._draining:
            raise shutting_down()
        if self._failed.is_set():
            raise NotReady(
                "the engine has stopped; try again, or another server",
                Reason.ENGINE_FAILED,
                AWAY_RETRY_SECONDS,
            )
        info = self.models[model_id]
        if model_id in self.failures:
            raise ModelUnusable(model_id, self.failures[model_id])
        if info is None or self.restoring:
            raise self._loading(model_id)
        return info

    def _loading(self, model_id: str) -> NotReady:
        times = self._load_times
        metadata = {"elapsed_seconds": f"{times.elapsed:.3f}"}
        known, retry_after = "", LOADING_RETRY_SECONDS
        if times.expected is not None:
            metadata["load_seconds"] = f"{times.expected:.3f}"
            known = f" ({times.elapsed:.0f} s; the last load took {times.expected:.0f} s)"
        if times.remaining is not None:
            retry_after = min(max(times.remaining, 0.25), LONGEST_LOADING_RETRY_SECONDS)
        return NotReady(
            f"model {model_id!r} is still loading{known}; try again in {retry_after:.1f} s",
            Reason.MODEL_LOADING,
            retry_after,
            metadata,
        )

    async def loaded(self) -> str:
        """Wait until the models are loaded, or cannot be: then the reason, else ""."""
        await self._loaded.wait()
        return self._failure

    async def failed(self) -> str:
        """Wait until no engine will come back; returns the reason."""
        await self._failed.wait()
        return self._failure

    def set_loaded(self, models: Iterable[ModelInfo]) -> None:
        """An engine holds ``models`` now. The adapters on offer stay those of before."""
        for info in models:
            before = self.models.get(info.id)
            self.models[info.id] = (
                info if before is None else replace(info, adapters=before.adapters)
            )
            self.failures.pop(info.id, None)
        self._load_times.record()
        self._loaded.set()

    def describe(self, descriptions: Iterable[ModelDescription]) -> None:
        """An engine has described models that it has not loaded.

        What is known of one that was loaded before stays.
        """
        for each in descriptions:
            if each.id in self._removed:
                continue  # It was described by a start that had begun before.
            if self.models.get(each.id) is None:
                self.models[each.id] = each.info
                if each.reason:
                    self.failures[each.id] = each.reason

    def describe_again(self, description: ModelDescription) -> None:
        """An engine has described a model that is new in the catalogue, or has other files."""
        if description.info is not None:
            self._set_info(description.info)
        if description.reason:
            self.failures[description.id] = description.reason
        else:
            self.failures.pop(description.id, None)

    def add_model(self, id: str) -> None:
        """A model is new in the catalogue; an engine will describe it."""
        self._removed.discard(id)
        self.models[id] = None

    def remove_model(self, id: str) -> None:
        """A model is not in the catalogue any more."""
        self._removed.add(id)
        self.models.pop(id, None)
        self.failures.pop(id, None)

    def set_model(self, info: ModelInfo) -> None:
        """An engine has loaded a model beside its jobs."""
        self.failures.pop(info.id, None)
        self._set_info(info)

    def _set_info(self, info: ModelInfo) -> None:
        offers = tuple(each for each in info.adapters if each.id not in self._withdrawn)
        self.models[info.id] = replace(info, adapters=offers)

    def correct(self, correction: Correction) -> None:
        """An engine has corrected what was measured of a model."""
        if (info := self.models.get(correction.model)) is not None:
            self.models[correction.model] = correction.of(info)

    def offer_adapter(self, offers: Mapping[str, AdapterOffer]) -> None:
        """Offer an adapter, in place of one of its name, to each model by its id."""
        self._withdrawn -= {offer.id for offer in offers.values()}
        for model_id, offer in offers.items():
            if (info := self.models.get(model_id)) is not None:
                others = (each for each in info.adapters if each.id != offer.id)
                self.models[model_id] = replace(info, adapters=(*others, offer))

    def withdraw_adapter(self, id: str) -> None:
        """Offer the adapter ``id`` no more."""
        self._withdrawn.add(id)
        for model_id, info in self.models.items():
            if info is not None:
                kept = tuple(each for each in info.adapters if each.id != id)
                self.models[model_id] = replace(info, adapters=kept)

    def set_draining(self) -> None:
        """Accept no jobs from now on: the server shuts down."""
        self._draining = True

    def set_failed(self, reason: str) -> None:
        """No engine will come back; ``reason`` is one line for the operator."""
        self._failure = reason
        self._failed.set()
        self._loaded.set()

    def report(self) -> None:
        """Report the state to the observer and to ``on_state``."""
        state = self.state
        self._observer.on_event(ReadyChanged(state is State.READY))
        self._on_state(state)


def shutting_down() -> NotReady:
    """The error for new and for unfinished jobs while the server shuts down."""
    return NotReady(
        "the server is shutting down; try again, or another server",
        Reason.DRAINING,
        AWAY_RETRY_SECONDS,
    )
