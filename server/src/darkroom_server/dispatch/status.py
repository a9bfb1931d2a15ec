"""The dispatcher and its engines at one moment, as plain data for operators."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from darkroom_server.core.events import MemoryReport
from darkroom_server.dispatch.admission.availability import Availability, QueueLimits
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.job import JobState
from darkroom_server.dispatch.jobs.outcomes import Counts, JobOutcome
from darkroom_server.dispatch.jobs.registry import JobRegistry


class State(Enum):
    """Whether jobs are taken, and drawn."""

    LOADING = auto()
    READY = auto()
    RECOVERING = auto()
    DRAINING = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """What a pass of so many rows is expected to take, in seconds; the size is in pixels."""

    width: int
    height: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model; ``pass_times`` are those of the sizes and row counts met so far."""

    id: str
    ready: bool
    queued_jobs: int
    running_jobs: int
    pass_times: tuple[PassTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine; ``device`` is empty and ``memory`` None until it has told."""

    index: int
    device: str
    ready: bool
    restarts: int
    jobs: int
    samples: int
    rows_in_use: int
    memory: MemoryReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything; ``ended_jobs`` are by how they ended."""

    state: State
    models: tuple[ModelStatus, ...]
    engines: tuple[EngineStatus, ...]
    queued_jobs: int
    max_queued_jobs: int
    running_jobs: int
    accepted_jobs: int
    ended_jobs: dict[str, int]


def snapshot_of(
    admission: Availability,
    roster: JobRegistry,
    fleet: EnginePool,
    counts: Counts,
    limits: QueueLimits,
) -> Snapshot:
    """The whole, as it is now."""
    return Snapshot(
        state=state_of(admission, fleet),
        models=_models(admission, roster, fleet.slots),
        engines=tuple(_engine(slot) for slot in fleet.slots),
        queued_jobs=roster.queued,
        max_queued_jobs=limits.jobs,
        running_jobs=roster.running,
        accepted_jobs=counts.accepted,
        ended_jobs={end.value: counts.by_end[end] for end in JobOutcome},
    )


def state_of(admission: Availability, fleet: EnginePool) -> State:
    """The state; a server whose engines are gone for good is on its way out, too."""
    if admission.closed:
        return State.DRAINING
    if not admission.open:
        return State.LOADING
    return State.READY if fleet.ready else State.RECOVERING


def _models(
    admission: Availability, roster: JobRegistry, slots: Sequence[EngineHandle]
) -> tuple[ModelStatus, ...]:
    """Every model, in the order in which the server was told of them."""
    seconds: dict[tuple[Group, int], list[float]] = defaultdict(list)
    for slot in slots:
        for group, rows, each in slot.speed.measured():
            seconds[group, rows].append(each)
    return tuple(
        ModelStatus(
            id=id,
            ready=info is not None,
            queued_jobs=roster.count(id, JobState.QUEUE),
            running_jobs=roster.count(id, JobState.ENGINE),
            pass_times=tuple(
                PassTime(
                    width=group.width,
                    height=group.height,
                    rows=rows,
                    seconds=sum(found) / len(found),
                )
                for (group, rows), found in sorted(seconds.items())
                if group.model == id
            ),
        )
        for id, info in admission.models.items()
    )


def _engine(slot: EngineHandle) -> EngineStatus:
    """What is known of one engine without asking it."""
    device = next((model.runtime.device for model in slot.models.values()), "")
    return EngineStatus(
        index=slot.index,
        device=device,
        ready=slot.ready,
        restarts=slot.restarts,
        jobs=len(slot.jobs),
        samples=slot.samples,
        rows_in_use=slot.last_rows if slot.jobs else 0,
        memory=slot.memory,
    )
