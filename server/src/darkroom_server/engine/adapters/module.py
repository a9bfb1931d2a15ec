"""A module, such as a denoiser, to which rows of a batch add adapters."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from darkroom_server.engine.adapters.layers import AdaptedLayer
from darkroom_server.engine.adapters.plan import ActivePlan, Plan, SlotPlan
from darkroom_server.engine.adapters.weights import LayerWeights, Mix

GATHERED_BYTES = 256 * 1024**2
"""Copies of weights, one for each row, that a batch may keep; above it, layers make none."""


class AdaptedModule:
    """Adds the adapters of each row to the layers of ``module``.

    A layer is changed when the first adapter for it arrives: without adapters, the module runs as
    it is. At most ``slots`` adapters are in the module at once, those used last. ``row_layers`` are
    the layers whose input has the rows of the batch in its first dimension, see ``row_layers_of``;
    None: not known, so rows of one batch must not differ. ``version`` changes when weights in slots
    have moved in memory, or more layers have them.
    """

    def __init__(
        self,
        module: Any,
        *,
        slots: int,
        dtype: torch.dtype,
        row_layers: Collection[str] | None = None,
    ) -> None:
        self._module = module
        self._dtype = dtype
        self._row_layers = row_layers
        self.version = 0
        self._active = ActivePlan()
        self._layers: dict[str, AdaptedLayer] = {}
        self._free = list(range(slots))[::-1]
        # The slot and the weights of each adapter, the least recently used first.
        self._held: dict[str, tuple[int, Mapping[str, LayerWeights]]] = {}
        self._last: Plan | None = None

    def unshareable(self, layers: Mapping[str, LayerWeights]) -> str:
        """Why rows with an adapter of ``layers`` cannot share a batch with others; "" if they can.

        Rows with the same adapters and scales always can.
        """
        for name, weights in layers.items():
            if weights.magnitude is not None:
                return f"{name} is a DoRA layer"
            if self._row_layers is None or name not in self._row_layers:
                return f"the input of {name} has other dimensions than the rows of a batch"
        return ""

    @contextmanager
    def rows(
        self, mixes: Sequence[Mix], weights: Mapping[str, Mapping[str, LayerWeights]]
    ) -> Iterator[None]:
        """Calls inside have these adapters, one mix for each row.

        ``weights`` are the layers of each adapter. One that has none for this module is left out.
        Raises ``ValueError`` for more adapters than there are slots.
        """
        mixes = [tuple((id, scale) for id, scale in mix if weights.get(id)) for mix in mixes]
        if not any(mixes):
            yield
            return
        self._active.plan = self._plan(mixes, weights)
        try:
            yield
        finally:
            self._active.plan = None

    @property
    def plan(self) -> Plan | None:
        """The adapters of the rows, inside ``rows``."""
        return self._active.plan if isinstance(self._active.plan, Plan) else None

    def slot_plan(self, rows: int, most: int) -> SlotPlan:
        """One for ``rows`` rows with up to ``most`` adapters each."""
        return SlotPlan(rows, most, self._dtype, self._module.device)

    @contextmanager
    def by_slots(self, plan: SlotPlan) -> Iterator[None]:
        """Calls inside, and graphs of them, have the adapters that ``plan`` holds when they run."""
        before = self._active.plan
        self._active.plan = plan
        try:
            yield
        finally:
            self._active.plan = before

    def remove(self, id: str) -> None:
        """Free the slot of an adapter that is not in memory any more, if it has one."""
        held = self._held.pop(id, None)
        if held is not None:
            self._free.append(held[0])

    def _plan(
        self, mixes: Sequence[Mix], weights: Mapping[str, Mapping[str, LayerWeights]]
    ) -> Plan:
        needed = dict.fromkeys(id for mix in mixes for id, _ in mix)
        same = all(id in self._held and self._held[id][1] is weights[id] for id in needed)
        if same and self._last is not None and self._last.mixes == tuple(mixes):
            return self._last
        for id in needed:
            self._place(id, weights[id], needed)
        most = max(map(len, mixes))
        row = sum(layer.bytes_per_gathered_row for layer in self._layers.values())
        self._last = Plan(
            mixes,
            {id: self._held[id][0] for id in needed},
            gathers=len(mixes) * most * row <= GATHERED_BYTES,
            shareable=not any(self.unshareable(weights[id]) for id in needed),
            dtype=self._dtype,
            device=self._module.device,
        )
        return self._last

    def _place(self, id: str, layers: Mapping[str, LayerWeights], needed: Collection[str]) -> None:
        """Put an adapter into a slot, in place of the least recently used one if none is free."""
        held = self._held.pop(id, None)
        if held is not None and held[1] is layers:
            self._held[id] = held  # Now the last used.
            return
        if held is not None:
            slot = held[0]
        elif self._free:
            slot = self._free.pop()
        else:
            unused = next((other for other in self._held if other not in needed), None)
            if unused is None:
                raise ValueError(f"{len(needed)} adapters in one batch are too many")
            slot = self._held.pop(unused)[0]
        for name in layers.keys() - self._layers.keys():
            layer = self._module.get_submodule(name)
            self._layers[name] = AdaptedLayer(name, layer, self._active, self._dtype)
            self.version += 1
        for name, adapted in self._layers.items():
            room = adapted.room
            adapted.put(slot, layers.get(name))
            self.version += adapted.room != room
        self._held[id] = (slot, layers)


def row_layers_of(
    module: Any, call: Callable[[int], object], candidates: Collection[str]
) -> frozenset[str]:
    """Those of ``candidates`` whose input has the rows of a call in its first dimension.

    ``call`` calls ``module`` with a number of rows. Two numbers are tried, so that a layer whose
    input has as many tokens as there are rows is not among them.
    """
    found = set(candidates)
    seen: set[str] = set()
    for rows in (2, 3):
        hooks = []
        for name in candidates:

            def look(_: Any, given: tuple[Any, ...], name: str = name, rows: int = rows) -> None:
                seen.add(name)
                if not given or given[0].shape[0] != rows:
                    found.discard(name)

            hooks.append(module.get_submodule(name).register_forward_pre_hook(look))
        try:
            call(rows)
        finally:
            for hook in hooks:
                hook.remove()
    return frozenset(found & seen)
