"""The catalogue of the fake server: which models are in memory, and what brings them there."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from darkroom_client._errors import ModelDoesNotFit, ModelNotFound, ModelUnusable, Violation
from darkroom_client._types.model import Model, ModelState
from darkroom_client.testing._models import off_device, on_device, unusable
from darkroom_client.testing._validation import invalid

LoadError = ModelUnusable | ModelDoesNotFit

_IN_MEMORY = (ModelState.LOADING, ModelState.RESIDENT, ModelState.HOST)


class Catalogue:
    """The models by id. The condition of the job registry guards it.

    ``errors``: why a load of a model fails, by its id. ``jobs_of``: the number of unfinished jobs
    of a model.
    """

    def __init__(
        self,
        models: Iterable[Model],
        errors: Mapping[str, LoadError],
        jobs_of: Callable[[str], int],
    ) -> None:
        self.errors = dict(errors)
        self._models = {model.id: _consistent(model) for model in models}
        self._unloading: set[str] = set()
        self._jobs_of = jobs_of

    @property
    def models(self) -> list[Model]:
        """All models, in the order that the server was given."""
        self._free_unused()
        return list(self._models.values())

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """The weights in memory."""
        tiers = {"device": ModelState.RESIDENT, "host": ModelState.HOST}
        return {
            tier: sum(model.weight_bytes for model in self.models if model.state is state)
            for tier, state in tiers.items()
        }

    def find(self, name: str) -> Model:
        """The model that ``name`` means, "" the only one; raises as a Darkroom server does."""
        models = self.models
        if name or len(models) == 1:
            return self._of_id(name or models[0].id)
        names = ", ".join(self._models)
        raise invalid(Violation(field="model", description=f"must be set, to one of {names}"))

    def use(self, id: str) -> Model:
        """Load a model for a request, unless it is loading, and record the use.

        Raises as ``errors`` says.
        """
        model = self._of_id(id)
        if model.state is not ModelState.LOADING:
            model = self._loaded(id)
        self._models[id] = replace(model, last_used=datetime.now(UTC))
        return self._models[id]

    def loaded(self, id: str) -> Model | None:
        """The model of a request, None while it is loading; raises as ``errors`` says."""
        if self._of_id(id).state is ModelState.LOADING:
            return None
        self._models[id] = self._loaded(id)
        return self._models[id]

    def load(self, id: str) -> Model:
        """Bring a model into memory; raises as ``errors`` says."""
        model = self._models[id] = self._loaded(id)
        self._unloading.discard(id)
        return model

    def unload(self, id: str) -> int:
        """Free a model once its unfinished jobs have ended; returns their number."""
        model = self._models[id] = replace(self._of_id(id), pinned=False)
        if model.state in _IN_MEMORY:
            self._unloading.add(id)
        return self._jobs_of(id)

    def pin(self, id: str, *, pinned: bool) -> Model:
        """Say whether a model stays in memory; one that does is loaded."""
        model = self.load(id) if pinned else self._of_id(id)
        self._models[id] = replace(model, pinned=pinned)
        return self._models[id]

    def _loaded(self, id: str) -> Model:
        model = self._of_id(id)
        error = self.errors.get(id)
        if error is not None and not model.ready:
            if isinstance(error, ModelUnusable):
                self._models[id] = off_device(model, ModelState.FAILED, str(error))
                raise unusable(id, str(error))
            if model.state is ModelState.LOADING:
                self._models[id] = off_device(model, ModelState.AVAILABLE)
            raise ModelDoesNotFit(f"no memory for model {id!r}: {error}")
        return on_device(model)

    def _of_id(self, id: str) -> Model:
        self._free_unused()
        if id not in self._models:
            raise ModelNotFound(f"no model {id!r}; this server holds {', '.join(self._models)}")
        return self._models[id]

    def _free_unused(self) -> None:
        for id in [id for id in self._unloading if not self._jobs_of(id)]:
            self._unloading.discard(id)
            self._models[id] = off_device(self._models[id], ModelState.AVAILABLE)


def _consistent(model: Model) -> Model:
    """``model`` with a ``ready`` and a ``state`` that do not contradict each other."""
    if model.state in (ModelState.RESIDENT, ModelState.UNKNOWN):
        state = ModelState.RESIDENT if model.ready else ModelState.LOADING
        return replace(model, state=state)
    return replace(model, ready=False)
