"""The adapters of one model: of its denoiser's rows, and of its prompts."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import structlog
import torch

from darkroom_server.core.job import Job
from darkroom_server.engine.adapters.module import AdaptedModule
from darkroom_server.engine.adapters.weights import AdapterWeights, LayerWeights, Mix, mix_of

log = structlog.get_logger(__name__)


class ModelAdapters:
    """Adds the adapters in memory to calls of one model's modules.

    ``modules`` are the components that adapters change, by name; ``denoiser`` is one of them.
    ``resident`` are the adapters in memory, by id. Each adapter of a job must be among them from
    the encoding of its prompts to the last step.
    """

    def __init__(
        self, pipeline: Any, denoiser: str, modules: Mapping[str, AdaptedModule], dtype: torch.dtype
    ) -> None:
        self.pipeline = pipeline
        self.dtype = dtype
        self.resident: dict[str, AdapterWeights] = {}
        self._denoiser = denoiser
        self._modules = modules
        self._logged: set[str] = set()

    @property
    def of_denoiser(self) -> AdaptedModule:
        """The denoiser with its adapters."""
        return self._modules[self._denoiser]

    def add(self, weights: AdapterWeights) -> None:
        """Keep an adapter that was read, in the model's data type."""
        self.resident[weights.id] = weights.to(self.dtype)

    def remove(self, id: str) -> None:
        """Free the memory of an adapter that no job uses."""
        del self.resident[id]
        for module in self._modules.values():
            module.remove(id)

    def group_key(self, job: Job) -> Hashable:
        """What must be equal in a batch; None if rows may have any adapters."""
        mix = mix_of(job)
        for id, _ in mix:
            layers = self._layers(self._denoiser).get(id, {})
            reason = self._modules[self._denoiser].unshareable(layers)
            if not reason:
                continue
            if id not in self._logged:
                self._logged.add(id)
                log.warning("adapter shares no batch with others", adapter=id, why=reason)
            return mix
        return None

    def denoising(self, jobs: Sequence[tuple[Job, int]]) -> AbstractContextManager[None]:
        """The denoiser's calls inside have the adapters of ``jobs``, each with a number of rows."""
        mixes = [mix for job, rows in jobs for mix in [mix_of(job)] * rows]
        return self._modules[self._denoiser].rows(mixes, self._layers(self._denoiser))

    def encoder_mix(self, job: Job) -> Mix:
        """The adapters of ``job`` that change its embeddings."""
        encoders = self._modules.keys() - {self._denoiser}
        return tuple(
            (id, scale)
            for id, scale in mix_of(job)
            if encoders & self.resident[id].components.keys()
        )

    @contextmanager
    def encoding(self, mix: Mix) -> Iterator[None]:
        """The text encoders' calls inside have the adapters of ``mix``, whatever their rows are."""
        with ExitStack() as stack:
            for name in self._modules.keys() - {self._denoiser} if mix else ():
                stack.enter_context(self._modules[name].rows([mix], self._layers(name)))
            yield

    def _layers(self, component: str) -> dict[str, Mapping[str, LayerWeights]]:
        return {
            id: weights.components[component]
            for id, weights in self.resident.items()
            if component in weights.components
        }


def denoising(
    adapters: ModelAdapters | None, jobs: Sequence[tuple[Job, int]]
) -> AbstractContextManager[None]:
    """As ``ModelAdapters.denoising``; nothing for a model without ``adapters``."""
    return nullcontext() if adapters is None else adapters.denoising(jobs)


def encoding(adapters: ModelAdapters | None, mix: Mix) -> AbstractContextManager[None]:
    """As ``ModelAdapters.encoding``; nothing for a model without ``adapters``."""
    return nullcontext() if adapters is None else adapters.encoding(mix)


def encoder_mix(adapters: ModelAdapters | None, job: Job) -> Mix:
    """As ``ModelAdapters.encoder_mix``; empty for a model without ``adapters``."""
    return () if adapters is None else adapters.encoder_mix(job)


def group_key(adapters: ModelAdapters | None, job: Job) -> Hashable:
    """As ``ModelAdapters.group_key``; None for a model without ``adapters``."""
    return None if adapters is None else adapters.group_key(job)
