"""Whether new jobs are accepted, and the error that says why not."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from darkroom_server.core.errors import NotReady, QueueFull, Reason, TooLarge, UnknownModel
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.estimation.remaining_work import megapixel_steps

LOADING_RETRY_SECONDS = 2.0
"""Loading takes seconds to minutes; asking this often costs nothing."""

AWAY_RETRY_SECONDS = 1.0
"""When this server is going away, another one may take the call at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait: so many jobs, and together so many megapixel-steps."""

    jobs: int
    megapixel_steps: float = math.inf

    def check(
        self, job: Job, waiting: Sequence[Job], retry_after: Callable[[int, float], float]
    ) -> None:
        """Raise ``QueueFull`` where ``job`` cannot wait behind ``waiting``.

        ``retry_after`` tells how long it takes until so many jobs and megapixel-steps are gone. A
        job that is larger than the limit may wait alone.
        """
        if len(waiting) >= self.jobs:
            raise QueueFull(
                f"{len(waiting)} jobs are waiting, and no more are taken",
                retry_after(len(waiting) - self.jobs + 1, 0.0),
            )
        work = sum(map(megapixel_steps, waiting))
        over = work + megapixel_steps(job) - self.megapixel_steps
        if waiting and over > 0:
            raise QueueFull(
                f"jobs of {work:.0f} megapixel-steps are waiting, of {self.megapixel_steps:g} that "
                f"may, and this one has {megapixel_steps(job):.1f}",
                retry_after(1, min(over, work)),
            )


class Availability:
    """The server's life as a caller feels it: loading, open, and one day closed for good.

    ``model_ids`` are the models the server was told to hold, in that order.
    """

    def __init__(self, model_ids: Iterable[str]) -> None:
        self.models: dict[str, ModelInfo | None] = dict.fromkeys(model_ids)
        self._loaded = False
        self._draining = False
        self._dead = False

    @property
    def open(self) -> bool:
        """Whether jobs are accepted."""
        return self._loaded and not (self._draining or self._dead)

    @property
    def closed(self) -> bool:
        """Whether jobs will never be accepted again."""
        return self._draining or self._dead

    def model(self, model_id: str) -> ModelInfo:
        """The loaded model ``model_id``; raises ``UnknownModel`` or ``NotReady``."""
        if model_id not in self.models:
            raise UnknownModel(model_id, list(self.models))
        if self._draining:
            raise going_away()
        if self._dead:
            raise NotReady(
                "the engine has stopped; try again, or another server",
                Reason.ENGINE_FAILED,
                AWAY_RETRY_SECONDS,
            )
        info = self.models[model_id]
        if info is None:
            raise NotReady(
                f"model {model_id!r} is still loading; try again in a moment",
                Reason.MODEL_LOADING,
                LOADING_RETRY_SECONDS,
            )
        return info

    def loaded(self, models: Iterable[ModelInfo]) -> None:
        """The engine holds these now."""
        self.models |= {info.id: info for info in models}
        self._loaded = True

    def drain(self) -> None:
        """The server is going away."""
        self._draining = True

    def died(self) -> None:
        """The engine is gone."""
        self._dead = True


def going_away() -> NotReady:
    """The error of those who come, or still wait, while the server shuts down."""
    return NotReady(
        "the server is shutting down; try again, or another server",
        Reason.DRAINING,
        AWAY_RETRY_SECONDS,
    )


def check_fits(job: Job, model: ModelInfo) -> None:
    """Raise ``TooLarge`` where one image of ``job`` does not fit the memory, even alone."""
    needed = model.memory.needed(job.width, job.height, job.rows_per_image)
    available = model.memory.available_bytes
    if needed > available:
        raise TooLarge(
            f"an image of {job.width}×{job.height} pixels needs {needed >> 20} MiB of memory, and "
            f"{model.runtime.device} has {available >> 20} MiB left; ask for a smaller one",
            metadata={"needed_bytes": str(needed), "available_bytes": str(available)},
        )
