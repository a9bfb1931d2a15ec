"""One layer of a module to whose output each row of a batch adds its own adapters.

A row's addition is ``up @ down @ x`` for each of its adapters. It is computed in one of six forms;
they differ in the last bits only. An adapter's weights are in a *slot*: slots of one layer are one
tensor, so that a batch's weights are selected with one call, whatever its adapters are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from darkroom_server.engine.adapters.plan import ActivePlan, Plan, SlotPlan
from darkroom_server.engine.adapters.weights import LayerWeights, Mix

MASKED_RANK = 64
"""Up to this summed rank a convolution of all adapters for all rows is faster than one for each."""

Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Adds to a layer's output: takes its input and its output, returns the sum.

The output is the layer's alone, so it may be added to in place, which saves a copy.
"""


class RowsNotFirst(RuntimeError):
    """The first dimension of a layer's input is not the rows of the batch."""


class AdaptedLayer:
    """Adds adapters to the output of ``layer``, a linear layer or a two-dimensional convolution.

    ``active`` has the plan of the batch that runs. ``dtype`` is that of the adapters' weights.
    """

    def __init__(self, name: str, layer: Any, active: ActivePlan, dtype: torch.dtype) -> None:
        self.name = name
        self._active = active
        self._layer = layer
        self._dtype = dtype
        self._device = layer.weight.device
        self._is_convolution = isinstance(layer, nn.Conv2d)
        self._ranks: dict[int, int] = {}
        self._magnitudes: dict[int, torch.Tensor] = {}
        self._down = self._zeros(0, 0, *layer.weight.shape[1:])
        self._up = self._zeros(0, 0, layer.weight.shape[0])
        self._planned: Plan | SlotPlan | None = None
        self._form: Form | None = None
        self._compute = layer.forward
        layer.forward = self._forward

    @property
    def bytes_per_gathered_row(self) -> int:
        """Bytes of the weights that a row with one adapter selects from the slots."""
        if self._is_convolution or not self._ranks:
            return 0
        element = self._down.element_size()
        return (self._down[0].numel() + self._up[0].numel()) * element

    @property
    def room(self) -> tuple[int, int]:
        """The slots and the rank that fit; when they change, the weights move in memory."""
        return self._down.shape[0], self._down.shape[1]

    def put(self, slot: int, weights: LayerWeights | None) -> None:
        """Put ``weights`` into ``slot``; None, for an adapter without this layer, clears it."""
        self._planned = None
        self._magnitudes.pop(slot, None)
        if weights is None:
            if self._ranks.pop(slot, None) is not None:
                self._down[slot] = 0
                self._up[slot] = 0
            return
        rank = weights.rank
        self._grow(slot + 1, rank)
        self._ranks[slot] = rank
        if weights.magnitude is not None:
            self._magnitudes[slot] = weights.magnitude.to(self._device)
        self._down[slot, :rank] = weights.down
        self._down[slot, rank:] = 0
        self._up[slot, :rank] = weights.up.reshape(-1, rank).T
        self._up[slot, rank:] = 0

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self._compute(x, *args, **kwargs)
        plan = self._active.plan
        if plan is None:
            return output
        if self._planned is not plan:
            self._planned, self._form = plan, self._choose(plan)
        return output if self._form is None else self._form(x, output)

    def _choose(self, plan: Plan | SlotPlan) -> Form | None:
        """The form for ``plan``, None if none of its adapters has this layer."""
        if isinstance(plan, SlotPlan):
            return self._by_slots(plan) if self._down.shape[0] else None
        if not any(slot in self._ranks for slot in plan.slots.values()):
            return None
        if plan.common is not None:
            return self._uniform(plan.common, plan)
        if self._is_convolution:
            used = tuple(slot for slot in plan.slots.values() if slot in self._ranks)
            thin = len(used) * self._down.shape[1] <= MASKED_RANK
            return self._masked(plan, used) if thin else self._sliced(plan)
        return self._gathered(plan) if plan.gathers else self._sliced(plan)

    def _uniform(self, mix: Mix, plan: Plan) -> Form:
        """All rows have the same adapters: one product, whatever the input's dimensions are."""
        parts = [(slot, scale) for id, scale in mix if (slot := plan.slots[id]) in self._ranks]
        if any(slot in self._magnitudes for slot, _ in parts):
            return self._dora(parts)
        down = torch.cat([self._down[slot, : self._ranks[slot]] for slot, _ in parts])
        up = torch.cat([self._up[slot, : self._ranks[slot]] * scale for slot, scale in parts])
        if self._is_convolution:
            down, kernel = self._laid_out(down), self._laid_out(up.T[:, :, None, None])
            return lambda x, output: output + F.conv2d(self._convolve(x, down), kernel)
        across = down.T

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            flat = output.reshape(-1, output.shape[-1])
            inner = x.reshape(-1, x.shape[-1]) @ across
            return flat.addmm_(inner, up).view(output.shape)

        return add

    def _dora(self, parts: list[tuple[int, float]]) -> Form:
        """As ``_uniform``, one adapter after the other; some scale the layer's own output."""
        layer = self._layer

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            for slot, scale in parts:
                rank, magnitude = self._ranks[slot], self._magnitudes.get(slot)
                down, up = self._down[slot, :rank], self._up[slot, :rank] * scale
                added = (x @ down.T) @ up
                if magnitude is None:
                    output = output + added
                    continue
                # Weights that are stored in eight bits can be added to nothing.
                weight = layer.weight.to(self._dtype)
                length = torch.linalg.norm(weight + (up.T @ down), dim=1)
                factor = magnitude / length
                plain = output if layer.bias is None else output - layer.bias.to(output.dtype)
                output = output + (factor - 1) * plain + factor * added
            return output

        return add

    def _gathered(self, plan: Plan) -> Form:
        """Each row's weights side by side, and two products for all rows."""
        rows = plan.rows
        index = plan.index.flatten()
        # The last slot is all zeros: for rows with fewer adapters, and adapters without this layer.
        empty = self._down.shape[0] - 1
        index = torch.where((index < 0) | (index >= empty), empty, index)
        down = self._down.index_select(0, index).view(rows, -1, self._down.shape[-1])
        up = self._up.index_select(0, index) * plan.scales.reshape(-1, 1, 1)
        up = up.view(rows, -1, self._up.shape[-1])
        across, inputs = down.transpose(1, 2), plan.inputs

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            self._check_rows(x, rows)
            inner = inputs.down(self.name, x, across)
            flat = output.reshape(rows, -1, output.shape[-1])
            return flat.baddbmm_(inner, up).view(output.shape)

        return add

    def _masked(self, plan: Plan, used: tuple[int, ...]) -> Form:
        """All adapters for all rows in one convolution; each row masks those it does not have."""
        rank = self._down.shape[1]
        index, scales = plan.masks(used)
        down = self._laid_out(self._down.index_select(0, index).flatten(0, 1))
        up = self._up.index_select(0, index).flatten(0, 1)
        kernel = self._laid_out(up.T[:, :, None, None])
        mask = scales.repeat_interleave(rank, dim=1)[:, :, None, None]
        rows = plan.rows

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            self._check_rows(x, rows)
            return output + F.conv2d(self._convolve(x, down) * mask, kernel)

        return add

    def _sliced(self, plan: Plan) -> Form:
        """One product for each run of rows with the same adapters; no weights are copied."""
        forms = [
            (start, end, self._uniform(mix, plan))
            for start, end, mix in plan.runs
            if any(plan.slots[id] in self._ranks for id, _ in mix)
        ]
        rows = plan.rows

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            self._check_rows(x, rows)
            output = output.clone()
            for start, end, form in forms:
                output[start:end] = form(x[start:end], output[start:end])
            return output

        return add

    def _by_slots(self, plan: SlotPlan) -> Form:
        """Each call selects the weights of its rows by what ``plan`` and the slots hold then.

        As ``_gathered`` and ``_masked``, with nothing that was made for one batch.
        """
        rows, empty = plan.rows, self._down.shape[0] - 1

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            self._check_rows(x, rows)
            index = plan.index.clamp_max(empty)
            if self._is_convolution:
                scales = plan.scales.new_zeros(rows, empty + 1).scatter_add_(1, index, plan.scales)
                mask = scales.repeat_interleave(self._down.shape[1], dim=1)[:, :, None, None]
                down = self._laid_out(self._down.flatten(0, 1))
                kernel = self._laid_out(self._up.flatten(0, 1).T[:, :, None, None])
                return output + F.conv2d(self._convolve(x, down) * mask, kernel)
            flat = index.flatten()
            down = self._down.index_select(0, flat).view(rows, -1, self._down.shape[-1])
            up = self._up.index_select(0, flat) * plan.scales.reshape(-1, 1, 1)
            inner = torch.bmm(x.reshape(rows, -1, x.shape[-1]), down.transpose(1, 2))
            added = output.reshape(rows, -1, output.shape[-1])
            return added.baddbmm_(inner, up.view(rows, -1, self._up.shape[-1])).view(output.shape)

        return add

    def _convolve(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        # As the layer itself: its stride, padding and dilation.
        return self._layer._conv_forward(x, down, None)  # type: ignore[no-any-return]

    def _laid_out(self, kernel: torch.Tensor) -> torch.Tensor:
        """``kernel`` in the layout of the layer's own."""
        own = self._layer.weight
        layout = torch.contiguous_format if own.is_contiguous() else torch.channels_last
        return kernel.contiguous(memory_format=layout)

    def _check_rows(self, x: torch.Tensor, rows: int) -> None:
        if x.shape[0] != rows:
            raise RowsNotFirst(f"{self.name}: {x.shape[0]} in place of {rows} rows")

    def _grow(self, slots: int, rank: int) -> None:
        """Make room for ``slots`` slots and one of zeros, of ``rank`` or more."""
        had, had_rank = self._down.shape[:2]
        if slots < had and rank <= had_rank:
            return
        # Doubled, so that a server with few adapters holds few slots.
        count = had if slots < had else 2 ** (slots - 1).bit_length() + 1
        rank = max(rank, had_rank)
        down = self._zeros(count, rank, *self._down.shape[2:])
        up = self._zeros(count, rank, self._up.shape[-1])
        down[:had, :had_rank], up[:had, :had_rank] = self._down, self._up
        self._down, self._up = down, up

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)
