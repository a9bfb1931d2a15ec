"""Which model is read into the host's memory next, beside the loads onto the device.

A read needs no place on the device, and takes much longer than a copy to it. So models whose
weights are on disk are read as soon as jobs wait for them, and the loads of others need not wait.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.models.states import ModelStates
from darkroom_server.dispatch.models.swaps import EngineView, SwapPolicy, Wanted, in_turn, may_fit


class ReadPlanner:
    """Begins reads: one at a time in each engine, in the order of the loads.

    A model that the host's memory cannot take is loaded from its files, while nothing is read.
    """

    def __init__(self, states: ModelStates, policy: SwapPolicy) -> None:
        self._states = states
        self._policy = policy

    def begin(
        self, wanted: Sequence[Wanted], ready: Sequence[EngineHandle], views: Sequence[EngineView]
    ) -> list[Wanted]:
        """Begin the reads that can begin; returns ``wanted``, each with who cannot load it yet."""
        due, others = self._policy.order(wanted, time.monotonic())
        alone = next((each for each in due if self._states.entries[each.id].deaths), None)
        if alone is not None:
            due, others = [alone], []
        for each, is_due in in_turn(due, others):
            if not any(may_fit(each, view) for view in views):
                continue
            from_files = not any(self.reads_first(engine, each.id) for engine in ready)
            if is_due and from_files and not self._states.in_host(each.id):
                break  # The disk is for this one, once its turn has come.
            self._begin(each, ready, due=is_due)
        everywhere = frozenset(range(len(ready)))
        return [
            replace(
                each,
                not_yet=everywhere
                if alone is not None and each is not alone
                else frozenset(self._not_yet(each.id, ready)),
            )
            for each in wanted
        ]

    def reads_first(self, engine: EngineHandle, id: str) -> bool:
        """Whether a load of a model has to wait until it was read into the host's memory."""
        return (
            engine.host_budget > 0
            and not engine.has_in_host(id)
            and id not in engine.files_only
            and self._states.entries[id].weight_bytes > 0
        )

    def _begin(self, wanted: Wanted, ready: Sequence[EngineHandle], *, due: bool) -> None:
        """Read a model into an engine that is to load it.

        If one has it on the host already, another reads it only once the load is due.
        """
        id = wanted.id
        able = [engine for i, engine in enumerate(ready) if i not in wanted.held_by]
        if not due and any(id in engine.host for engine in able):
            return
        for engine in sorted(able, key=lambda each: (each.samples, each.index)):
            if engine.reading is not None or not self.reads_first(engine, id):
                continue
            if engine.loading is not None and engine.loading.from_files:
                continue  # The disk is busy.
            if self._may_run_beside(id, engine):
                if self._states.host.stage(engine, id):
                    self._states.begin_read(engine, id)
                else:
                    engine.files_only.add(id)
                return

    def _not_yet(self, id: str, ready: Sequence[EngineHandle]) -> Iterable[int]:
        """The engines that cannot load a model now: they read it before, or read another one."""
        for index, engine in enumerate(ready):
            from_files = engine.reading is not None and not engine.has_in_host(id)
            beside = self._may_run_beside(id, engine)
            if from_files or self.reads_first(engine, id) or not beside:
                yield index

    def _may_run_beside(self, id: str, engine: EngineHandle) -> bool:
        """Whether a model may be read or loaded beside what the engine reads or loads now.

        One in whose load an engine died is loaded alone, so that it is known whose fault it is.
        """
        others = [each.model for each in engine.in_progress]
        return not others or not any(self._states.entries[each].deaths for each in (id, *others))
