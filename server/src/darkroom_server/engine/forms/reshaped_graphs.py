"""Graphs of a denoiser's calls at other sizes than a model's default.

Which sizes are usual is known only from requests, so a graph is recorded when many batches of its
kind have come: rows, and shapes of the arguments, which follow from the images' size and from the
length of prompts.
"""

from collections import Counter
from functools import partial

import structlog
import torch

from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, WrongOutput
from darkroom_server.engine.forms.graphs import (
    GraphedDenoiser,
    Recorder,
    contain_failure,
    graph_memory_counted,
)
from darkroom_server.engine.forms.signature import Signature, Values
from darkroom_server.engine.pipelines.arguments import Arguments

log = structlog.get_logger(__name__)

RECORDED_AFTER = 256
"""Batches of a kind, which run eagerly: those of several images, for a size that comes again."""

MOST_SHAPES = 4
"""Shapes besides the default ones, as each takes memory that stays taken."""

MOST_COUNTED = 1024
"""Kinds whose batches are counted; then all are counted from 0 again."""

Shapes = tuple[object, ...]


def record_reshaped_later(model: Model, recorder: Recorder) -> None:
    """Let ``model``, if it runs graphs, run graphs of other usual sizes too."""
    forms = model.forms
    if forms is not None and isinstance(forms.other, GraphedDenoiser):
        forms.reshaped = ReshapedGraphs(model.info.id, forms, recorder).run


class ReshapedGraphs:
    """Runs calls of other shapes than those of ``forms`` as graphs, once many of a kind came."""

    def __init__(self, model: str, forms: DenoiserForms, recorder: Recorder) -> None:
        self._model = model
        self._forms = forms
        self._recorder = recorder
        self._seen: Counter[tuple[Shapes, int]] = Counter()
        self._recorded: dict[tuple[Shapes, int], GraphedDenoiser] = {}
        self._failed = False

    def run(self, given: Arguments) -> tuple[torch.Tensor] | None:
        """What the denoiser returns for ``given``, None if it is to run eagerly."""
        signature = self._forms.signature.reshaped(given)
        values = None if signature is None else signature.arranged(given)
        if signature is None or values is None:
            return None
        rows = signature.rows(values)
        bucket = min((each for each in self._forms.graph_rows if each >= rows), default=None)
        if bucket is None:
            return None
        kind = tuple(signature.kinds.values()), bucket
        graphed = self._recorded.get(kind)
        if graphed is not None:
            return graphed(values)
        if self._is_usual(kind):
            filled = signature.filled_up(values, bucket)
            self._forms.to_record = partial(self._record, kind, signature, filled)
        return None

    def _is_usual(self, kind: tuple[Shapes, int]) -> bool:
        """Count a batch of ``kind``; whether it is time to record it."""
        if self._failed:
            return False
        shapes = {each for each, _ in self._recorded}
        if kind[0] not in shapes and len(shapes) == MOST_SHAPES:
            return False
        if len(self._seen) >= MOST_COUNTED and kind not in self._seen:
            self._seen.clear()
        self._seen[kind] += 1
        return self._seen[kind] == RECORDED_AFTER

    def _record(self, kind: tuple[Shapes, int], signature: Signature, filled: Values) -> None:
        """Record a graph and compare it. If that fails, no more are recorded, and the log says so.

        Without memory for it, those that were recorded stay.
        """
        bucket, generator = kind[1], torch.Generator().manual_seed(kind[1])
        try:
            graphed = GraphedDenoiser(self._forms.denoiser, signature, filled, self._recorder)
            distinct = signature.distinct_rows(signature.arguments(filled), generator)
            tried = signature.arranged(distinct)
            if tried is None:
                raise WrongOutput("its arguments are of other kinds in a batch")
            eager = graphed.eager(tried)
            if not eager.isfinite().all():
                self._seen[kind] = 0  # It says nothing about a graph.
                return
            with graph_memory_counted(self._forms, graphed.device):
                graph = graphed.recorded(bucket)
                self._forms.check(graphed.replay(graph, tried)[0], eager)
        except Exception as error:  # noqa: BLE001 - it is contained, or raised again.
            self._failed = True
            event = "batches of other sizes stay eager"
            contain_failure(error, self._recorded, self._model, event)
            return
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        graphed.add(bucket, graph)
        self._recorded[kind] = graphed
        self._forms.graph_bytes += graphed.buffer_bytes
        shapes = {n: list(v.shape) for n, v in filled.items() if isinstance(v, torch.Tensor)}
        log.info("graph of another size recorded", model=self._model, shapes=shapes)
