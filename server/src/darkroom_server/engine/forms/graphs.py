"""Graphs of a denoiser's kernels, one for each of a few numbers of rows.

A GPU that runs a batch of a few rows waits for the host, which launches each kernel by itself. A
graph is launched as a whole. It always reads and writes the same memory, so a batch is copied into
buffers, and is filled up to the next number of rows that was recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog
import torch

from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import is_fatal, is_out_of_memory, one_line
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, WrongOutput
from darkroom_server.engine.forms.signature import Signature, TensorKind, Values

log = structlog.get_logger(__name__)

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of rows that are recorded: at most a third of a batch's rows are filled up."""

WARM_UP_CALLS = 2
"""Before a call is recorded: in the first ones libraries choose kernels and allocate memory."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A recorded call: ``replay`` runs it again, which changes ``output``."""

    replay: Callable[[], None]
    output: torch.Tensor


class Recorder(Protocol):
    """Records graphs."""

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        """The graph of ``call``, which reads buffers. Raises what torch raises."""


class CudaRecorder:
    """Records CUDA graphs, whose memory is one pool: no two of them run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        """The graph of ``call``, which reads buffers. Raises what torch raises."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Not on the default stream, on which nothing can be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = call()
        return Graph(graph.replay, output)


class GraphedDenoiser:
    """Runs the batches of ``denoiser`` with calls of ``signature`` as graphs.

    ``most_rows`` are those of the widest graph. ``example`` are values of a call of as many rows;
    their values are in rows that are not used yet.
    """

    def __init__(
        self, denoiser: Any, signature: Signature, example: Values, recorder: Recorder
    ) -> None:
        self._denoiser = denoiser
        self._signature = signature
        self._recorder = recorder
        self._buffers = {
            name: each.clone() if isinstance(each, torch.Tensor) else each
            for name, each in example.items()
        }
        self._graphs: dict[int, Graph] = {}

    @property
    def recorded_rows(self) -> list[int]:
        """The rows of the graphs."""
        return sorted(self._graphs)

    def record(self, rows: int) -> None:
        """Record the call of ``rows`` rows. Raises what torch raises."""
        arguments = self._signature.arguments(
            {name: self._rows_of(name, rows) for name in self._buffers}
        )
        self._graphs[rows] = self._recorder.record(lambda: self._denoiser(**arguments)[0])

    def takes(self, rows: int, *, exact: bool) -> bool:
        """Whether a graph runs ``rows`` rows; those of an exact job are not filled up."""
        return rows in self._graphs if exact else rows <= max(self._graphs)

    def __call__(self, values: Values) -> tuple[torch.Tensor]:
        """What the denoiser returns for ``values``."""
        rows = self._signature.rows(values)
        graph = self._graphs[min(each for each in self._graphs if each >= rows)]
        names = [n for n, kind in self._signature.kinds.items() if isinstance(kind, TensorKind)]
        # All at once: a launch is what a graph saves.
        torch._foreach_copy_([self._rows_of(n, rows) for n in names], [values[n] for n in names])
        graph.replay()
        # A copy: a scheduler may keep it, and the next batch overwrites the graph's own.
        return (graph.output[:rows].clone(),)

    def _rows_of(self, name: str, rows: int) -> Any:
        """The part of a buffer that a call of ``rows`` rows uses."""
        kind = self._signature.kinds[name]
        buffer = self._buffers[name]
        if not isinstance(kind, TensorKind) or None not in kind.shape:
            return buffer
        return buffer.narrow(kind.shape.index(None), 0, rows)


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows to record if a batch has at most ``max_rows``."""
    return tuple(rows for rows in BUCKETS if rows <= max_rows)


def record_graphs(model: Model, recorder: Recorder) -> int:
    """Let ``model`` run graphs, if its ``forms`` say so; returns the bytes that they take.

    Each is compared with the eager denoiser. If the memory ends, there are fewer of them; if
    nothing can be recorded, the denoiser stays eager. Both are logged.
    """
    forms = model.forms
    if forms is None or not forms.graph_rows:
        return 0
    before = available_bytes(model.device)
    graphed = _recorded(model.info.id, forms, recorder)
    if graphed is None:
        return 0
    forms.other = graphed
    left = available_bytes(model.device)
    info = model.info.with_runtime(denoiser=DenoiserForm.GRAPHS)
    memory = replace(info.memory, available_bytes=min(info.memory.available_bytes, left))
    model.info = replace(info, memory=memory)
    taken = max(0, before - left)
    log.info("graphs recorded", model=info.id, rows=graphed.recorded_rows, bytes=taken)
    return taken


def _recorded(id: str, forms: DenoiserForms, recorder: Recorder) -> GraphedDenoiser | None:
    """The graphs, the widest first, so that narrower ones fit into its memory."""
    graphed: GraphedDenoiser | None = None
    for rows in sorted(forms.graph_rows, reverse=True):
        try:
            arguments = forms.example(rows)
            values = forms.signature.arranged(arguments)
            if values is None:
                raise WrongOutput("its arguments are of other kinds in a batch")
            if graphed is None:
                graphed = GraphedDenoiser(forms.denoiser, forms.signature, values, recorder)
            graphed.record(rows)
            forms.check(graphed(values)[0], forms.denoiser(**arguments)[0])
        except Exception as error:
            if is_fatal(error):
                raise
            if not is_out_of_memory(error):
                log.warning("denoiser stays eager", model=id, why=one_line(error))
                return None
            log.warning("no memory for the graph of a batch", model=id, rows=rows)
            # Also the buffers, if they are of more rows than any graph.
            graphed = graphed if graphed is not None and graphed.recorded_rows else None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return graphed if graphed is not None and graphed.recorded_rows else None
