"""Which slots of adapters the rows of a batch take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from darkroom_server.engine.adapters.shared_inputs import SharedInputs
from darkroom_server.engine.adapters.weights import Mix
from darkroom_server.engine.device.transfer import send, send_together

NO_SLOT = 1 << 30
"""In place of a missing adapter's slot, for graphs: more than any layer has."""


class Plan:
    """The adapters of each row of a batch. A layer keeps what it made for a plan while it lasts.

    ``mixes`` has one entry for each row, ``slots`` the slot of each adapter in it. ``gathers``:
    linear layers may copy the weights of each row. ``shareable``: each of the adapters can share a
    batch with any other.
    """

    def __init__(
        self,
        mixes: Sequence[Mix],
        slots: Mapping[str, int],
        *,
        gathers: bool,
        shareable: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.mixes = tuple(mixes)
        self.slots = dict(slots)
        self.gathers = gathers
        self.shareable = shareable
        self.inputs = SharedInputs()
        self._dtype = dtype
        self._device = device
        self._masks: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.mixes)

    @property
    def most(self) -> int:
        """Adapters of the row that has most."""
        return max(map(len, self.mixes))

    @property
    def common(self) -> Mix | None:
        """The adapters of all rows, None if rows differ."""
        return self.mixes[0] if len(set(self.mixes)) == 1 else None

    @property
    def runs(self) -> list[tuple[int, int, Mix]]:
        """First row, end and adapters of each run of rows that have the same ones."""
        runs, start = [], 0
        for mix, rows in groupby(self.mixes):
            end = start + len(list(rows))
            runs.append((start, end, mix))
            start = end
        return runs

    @cached_property
    def index(self) -> torch.Tensor:
        """[rows, adapters of the row that has most]: slots, -1 in place of a missing adapter."""
        index = [
            [self.slots[id] for id, _ in mix] + [-1] * (self.most - len(mix)) for mix in self.mixes
        ]
        return send(torch.tensor(index), self._device)

    @cached_property
    def scales(self) -> torch.Tensor:
        """As ``index``, the scales; 0 in place of a missing adapter."""
        scales = [[s for _, s in mix] + [0.0] * (self.most - len(mix)) for mix in self.mixes]
        return send(torch.tensor(scales, dtype=self._dtype), self._device)

    def masks(self, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """``slots`` as an index, and [rows, slots]: how strong each row has the adapter in each."""
        if slots not in self._masks:
            by_row = [{self.slots[id]: scale for id, scale in mix} for mix in self.mixes]
            scales = [[row.get(slot, 0.0) for slot in slots] for row in by_row]
            numbers = torch.tensor(slots), torch.tensor(scales, dtype=self._dtype)
            index, strength = send_together(numbers, self._device)
            self._masks[slots] = index, strength
        return self._masks[slots]


class SlotPlan:
    """The slots and the scales of each row, in memory that does not move: a graph reads it.

    ``index`` and ``scales`` are [rows, most].
    """

    def __init__(self, rows: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self.index = torch.full((rows, most), NO_SLOT, device=device)
        self.scales = torch.zeros((rows, most), dtype=dtype, device=device)
        self._filled: Plan | None = None

    def fill(self, plan: Plan) -> None:
        """Take over the rows of ``plan``, which has no more; those beyond have no adapters."""
        if plan is self._filled:
            return
        index = torch.where(plan.index < 0, NO_SLOT, plan.index)
        self.index.fill_(NO_SLOT)
        self.scales.zero_()
        self.index[: plan.rows, : plan.most] = index
        self.scales[: plan.rows, : plan.most] = plan.scales
        self._filled = plan


@dataclass(slots=True)
class ActivePlan:
    """The plan of the batch that a module runs, None outside of one and without adapters."""

    plan: Plan | SlotPlan | None = None
