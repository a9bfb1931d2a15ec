"""Graphs of a denoiser whose rows have LoRA adapters.

The slots and the scales of the rows are inputs of a graph, as latents are: one graph serves any
adapters. A graph reads the weights at one place in memory, so all graphs are dropped when weights
move, as for the first adapter of a larger rank.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from darkroom_server.engine.adapters.module import AdaptedModule
from darkroom_server.engine.adapters.plan import Plan, SlotPlan
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.graphs import (
    Graph,
    GraphedDenoiser,
    contain_failure,
    graph_memory_counted,
)
from darkroom_server.engine.forms.signature import Values

log = structlog.get_logger(__name__)

RECORDED_AFTER = 4
"""Batches of a kind, which run eagerly: a graph costs more than a few of them."""


def record_adapted_later(model: Model) -> None:
    """Let ``model``, if it runs graphs and has adapters, run graphs with those too."""
    forms = model.forms
    if forms is None or model.adapters is None or not isinstance(forms.other, GraphedDenoiser):
        return
    module = model.adapters.of_denoiser
    forms.adapted = AdaptedGraphs(model.info.id, forms, forms.other, module).run


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: Graph
    slots: SlotPlan


class AdaptedGraphs:
    """Runs batches with adapters as graphs, for the rows of which ``graphed`` has graphs.

    ``module`` is the denoiser with its adapters. A graph is recorded when batches of its rows have
    come for a while, and is compared with the eager denoiser of ``forms``.
    """

    def __init__(
        self,
        model: str,
        forms: DenoiserForms,
        graphed: GraphedDenoiser,
        module: AdaptedModule,
    ) -> None:
        self._model = model
        self._forms = forms
        self._graphed = graphed
        self._module = module
        self._version = module.version
        self._seen: Counter[tuple[int, int]] = Counter()
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._failed = False

    def run(self, values: Values) -> tuple[torch.Tensor] | None:
        """What the denoiser returns for ``values`` with the adapters of the batch that runs.

        None if it is to run eagerly. Rows that ``graphed`` takes.
        """
        plan = self._module.plan
        if plan is None or not plan.shareable:
            return None
        if self._version != self._module.version:
            self._recorded.clear()
            self._seen.clear()
            self._version = self._module.version
        # Rows with fewer adapters are filled up, so a power of two limits the number of graphs.
        kind = self._graphed.bucket(values), 1 << (plan.most - 1).bit_length()
        recorded = self._recorded.get(kind)
        if recorded is None and self._failed:
            return None
        if recorded is None:
            self._seen[kind] += 1
            if self._seen[kind] == RECORDED_AFTER:
                eager = self._graphed.eager(values)
                own = {
                    n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()
                }
                self._forms.to_record = partial(self._record, kind, plan, own, eager)
            return None
        recorded.slots.fill(plan)
        return self._graphed.replay(recorded.graph, values)

    def _record(
        self, kind: tuple[int, int], plan: Plan, values: Values, eager: torch.Tensor
    ) -> None:
        """Record a graph and compare it. If that fails, no more are recorded, and the log says so.

        Without memory for it, those that were recorded stay.
        """
        rows, most = kind
        if not eager.isfinite().all():
            self._seen[kind] = 0  # It says nothing about a graph.
            return
        try:
            slots = self._module.slot_plan(rows, most)
            with graph_memory_counted(self._forms, self._graphed.device):
                graph = self._graphed.recorded(rows, partial(self._module.by_slots, slots))
                slots.fill(plan)
                self._forms.check(self._graphed.replay(graph, values)[0], eager)
        except Exception as error:  # noqa: BLE001 - it is contained, or raised again.
            self._failed = True
            event = "batches with adapters stay eager"
            contain_failure(error, self._recorded, self._model, event)
            return
        self._recorded[kind] = _Recorded(graph, slots)
        log.info("graph with adapters recorded", model=self._model, rows=rows, adapters=most)
