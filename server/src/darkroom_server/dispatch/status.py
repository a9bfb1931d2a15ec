"""The dispatcher and its engines at one moment, as plain data for operators."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from darkroom_server.core.events import MemoryReport
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.admission.availability import Availability, State
from darkroom_server.dispatch.admission.limits import QueueLimits
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.outcomes import Counts, JobOutcome
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTime:
    """Expected seconds of a batch of ``rows`` rows of images of ``width`` × ``height`` pixels."""

    width: int
    height: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model; ``batch_times``: of the sizes and row counts seen so far.

    ``place``: its state. ``info``: what is known of it, None until an engine has loaded or
    described it.
    """

    id: str
    place: CatalogStatus
    info: ModelInfo | None
    queued_jobs: int
    running_jobs: int
    batch_times: tuple[BatchTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine; ``device`` is "" and ``memory`` None until it has reported.

    ``weight_bytes``: of the models that it holds, by tier.
    """

    index: int
    device: str
    ready: bool
    restarts: int
    jobs: int
    samples: int
    rows_in_use: int
    memory: MemoryReport | None
    weight_bytes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything; ``ended_jobs`` are counted by outcome."""

    state: State
    models: tuple[ModelStatus, ...]
    engines: tuple[EngineStatus, ...]
    queued_jobs: int
    max_queued_jobs: int
    running_jobs: int
    accepted_jobs: int
    ended_jobs: dict[str, int]


def snapshot_of(
    availability: Availability,
    registry: JobRegistry,
    pool: EnginePool,
    counts: Counts,
    limits: QueueLimits,
    place: Callable[[str], CatalogStatus],
) -> Snapshot:
    """The dispatcher now; ``place`` says where a model is, by its id."""
    return Snapshot(
        state=availability.state,
        models=_models(availability, registry, pool.engines, place),
        engines=tuple(_engine(engine) for engine in pool.engines),
        queued_jobs=registry.queued,
        max_queued_jobs=limits.jobs,
        running_jobs=registry.running,
        accepted_jobs=counts.accepted,
        ended_jobs={outcome.value: counts.by_end[outcome] for outcome in JobOutcome},
    )


def _models(
    availability: Availability,
    registry: JobRegistry,
    engines: Sequence[EngineHandle],
    place: Callable[[str], CatalogStatus],
) -> tuple[ModelStatus, ...]:
    seconds: dict[tuple[Group, int], list[float]] = defaultdict(list)
    for engine in engines:
        for group, rows, each in engine.batch_times.measured():
            seconds[group, rows].append(each)
    return tuple(
        ModelStatus(
            id=id,
            place=place(id),
            info=info,
            queued_jobs=registry.counts(id)[0],
            running_jobs=registry.counts(id)[1],
            batch_times=tuple(
                BatchTime(
                    width=group.width,
                    height=group.height,
                    rows=rows,
                    seconds=sum(found) / len(found),
                )
                for (group, rows), found in sorted(seconds.items())
                if group.model == id
            ),
        )
        for id, info in availability.models.items()
    )


def _engine(engine: EngineHandle) -> EngineStatus:
    device = next((model.runtime.device for model in engine.models.values()), "")
    return EngineStatus(
        index=engine.index,
        device=device,
        ready=engine.ready,
        restarts=engine.restarts,
        jobs=len(engine.jobs),
        samples=engine.samples,
        rows_in_use=engine.last_rows if engine.jobs else 0,
        memory=engine.memory,
        weight_bytes=engine.bytes_by_tier,
    )
