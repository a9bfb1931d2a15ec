"""The policies that are compared: ours, and two that take no account of what a load costs.

They are exchanged within our own server, for a benchmark only.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import StrEnum
from unittest.mock import patch

from bench.trace.costs import LoadCosts
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.job import Job
from darkroom_server.dispatch import ActiveJob, Dispatcher, dispatcher
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.models import planner, states
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.models.residency import Resident, Room, make_room
from darkroom_server.dispatch.models.swaps import SwapPolicy, Wanted

NO_PATIENCE = 1000
"""A priority so high that the patience is zero: the goal of a job is then its arrival."""


class Policy(StrEnum):
    """What decides on loads, and on the order of jobs."""

    OURS = "darkroom"
    FIRST_COME = "first come"
    LRU = "lru"
    LRU_ADMITTING = "lru admitting"
    """LRU, and a job of another model than the running ones enters as with ours."""


LABELS = {
    Policy.OURS: "Darkroom",
    Policy.FIRST_COME: "(a) first come, first served",
    Policy.LRU: "(b) LRU without lookahead",
    Policy.LRU_ADMITTING: "as (b), with our admission of jobs",
}


class KnownCosts(LoadPace):
    """Knows what each load costs, by the tier in which the model is."""

    def __init__(self, costs: LoadCosts) -> None:
        super().__init__()
        self._costs = costs

    def expected(self, entry: CatalogEntry, *, in_host: bool = False) -> float:
        """Seconds that a load of any model takes from there."""
        return self._costs.cost(in_host=in_host)


class InOrderOfArrival(SwapPolicy):
    """Loads begin at once, in the order of arrival; what was used longest ago makes room.

    A model whose jobs wait longer stays.
    """

    def order(self, wanted: Iterable[Wanted], now: float) -> tuple[list[Wanted], list[Wanted]]:
        """All, by the first job that waits."""
        return sorted(wanted, key=lambda each: (each.due, each.since, each.id)), []

    def room(
        self, wanted: Wanted, residents: Sequence[Resident], budget: float, *, due: bool
    ) -> Room | None:
        """Whatever was used longest ago."""
        kept = [each.id for each in residents if each.queued and each.due <= wanted.due]
        return make_room(wanted.bytes, budget, residents, kept, lambda each: each.last_used)


class EveryModel(set[str]):
    """All models, whatever their ids."""

    def __contains__(self, model: object) -> bool:
        return True

    def issuperset(self, models: Iterable[object]) -> bool:
        """Always."""
        return True


class NobodyOvertakes(EnginePool):
    """Jobs enter the engines in their order: one whose model is not there holds up the others."""

    @property
    def models_wanted(self) -> bool:
        """Loads are planned at each change."""
        return True

    @models_wanted.setter
    def models_wanted(self, _: bool) -> None: ...

    @property
    def held(self) -> set[str]:
        """As if all were there: then no job behind one whose model is not there is tried."""
        return EveryModel()


class FirstCome(Dispatcher):
    """Serves in the order of arrival; the engine orders by the same jobs."""

    def submit(self, job: Job, caller: Caller = ANONYMOUS) -> ActiveJob:
        """Accept ``job`` behind all earlier ones."""
        return super().submit(replace(job, priority=NO_PATIENCE), caller)


def dispatcher_of(policy: Policy) -> type[Dispatcher]:
    """The dispatcher of a server with ``policy``."""
    return FirstCome if policy is Policy.FIRST_COME else Dispatcher


@contextmanager
def exchanged(policy: Policy, costs: LoadCosts) -> Iterator[None]:
    """Build a ``dispatcher_of`` a policy, which knows what loads cost."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(states, "LoadPace", lambda: KnownCosts(costs)))
        if policy is not Policy.OURS:
            stack.enter_context(patch.object(planner, "SwapPolicy", InOrderOfArrival))
        if policy not in (Policy.OURS, Policy.LRU_ADMITTING):
            stack.enter_context(patch.object(EngineHandle, "admits", lambda *_: True))
        if policy is Policy.FIRST_COME:
            stack.enter_context(patch.object(dispatcher, "EnginePool", NobodyOvertakes))
        yield
