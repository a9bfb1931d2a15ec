"""Graphs of a denoiser's kernels, one for each of a few numbers of rows.

A GPU that runs a batch of a few rows waits for the host, which launches each kernel by itself. A
graph is launched as a whole. It always reads and writes the same memory, so a batch is copied into
buffers, and is filled up to the next number of rows that was recorded.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

import structlog
import torch

from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.catalogue.slices import pause
from darkroom_server.engine.device.memory import graph_pool_bytes
from darkroom_server.engine.failures import is_fatal, is_out_of_memory, one_line
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, WrongOutput
from darkroom_server.engine.forms.signature import Signature, TensorKind, Values
from darkroom_server.engine.forms.waits import refusing_waits

log = structlog.get_logger(__name__)

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of rows that are recorded: at most a third of a batch's rows are filled up."""

LONE_ROWS = 2
"""Of a batch with one image that has guidance."""

WARM_UP_CALLS = 2
"""Before a call is recorded: in the first ones libraries choose kernels and allocate memory."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A recorded call: ``replay`` runs it again, which changes ``output``.

    ``keeps`` has the kernels, which must live as long, or None if torch has them.
    """

    replay: Callable[[], None]
    output: torch.Tensor
    keeps: object = None


class Recorder(Protocol):
    """Records graphs of one model."""

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        """The graph of ``call``, which reads buffers. Raises what torch raises."""


class CudaRecorder:
    """Records CUDA graphs, whose memory is one pool: no two of them run at once.

    The pool is the device's again when no graph of it is left, so each model has its own.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        """The graph of ``call``, which reads buffers. Raises what torch raises."""
        if not self._graphs:
            # torch takes no pool again whose last graph is gone, or whose first one failed.
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        stream = _recording_stream(current.device)
        graph = torch.cuda.CUDAGraph()
        # For its end: where a capture fails, torch leaves the other stream the current one.
        with torch.cuda.stream(current):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    call()
            current.wait_stream(stream)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = call()
        self._graphs.add(graph)
        return Graph(graph.replay, output)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Not the default stream, on which nothing can be recorded.

    One for all graphs: cuBLAS keeps memory for each stream on which it ran. In calls before the
    first capture it takes that outside of the graphs' pool.
    """
    return torch.cuda.Stream(device)


class GraphedDenoiser:
    """Runs the batches of ``denoiser`` with calls of ``signature`` as graphs.

    ``example`` are values of a call of as many rows as the widest graph has; their values are in
    rows that are not used yet. Some graphs may have a second one, of the compiled denoiser.
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
        self._compiled: dict[int, Graph] = {}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self._tensors[0].device

    @property
    def buffer_bytes(self) -> int:
        """The bytes of what batches are copied into."""
        return sum(each.nbytes for each in self._tensors)

    @property
    def recorded_rows(self) -> list[int]:
        """The rows of the graphs."""
        return sorted(self._graphs)

    def recorded(
        self, rows: int, inside: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Graph:
        """A graph of the call of ``rows`` rows ``inside`` a context.

        Raises ``WaitsForDevice`` if it cannot be recorded, and what torch raises.
        """
        arguments = self._signature.arguments(self._values_of(rows))
        denoiser = self._denoiser

        def call() -> torch.Tensor:
            with inside():
                output: torch.Tensor = denoiser(**arguments)[0]
            return output

        with refusing_waits(self.device):
            call()
        return self._recorder.record(call)

    def recorded_compiled(self, rows: int, compiled: Callable[[Values], Any]) -> Graph:
        """A graph of the call of ``compiled`` with ``rows`` rows. Raises what torch raises."""
        values = self._values_of(rows)

        def call() -> torch.Tensor:
            # Compiled code does not look where values lie in memory.
            output: torch.Tensor = compiled(self._signature.laid_out(values, rows))[0]
            return output

        return replace(self._recorder.record(call), keeps=compiled)

    def add(self, rows: int, graph: Graph) -> None:
        """Run ``graph`` for batches that are filled up to ``rows`` rows."""
        self._graphs[rows] = graph

    def add_compiled(self, rows: int, graph: Graph) -> None:
        """Run ``graph``, of the compiled denoiser, in place of that of ``rows`` rows.

        Not for exact jobs.
        """
        self._compiled[rows] = graph

    def takes(self, rows: int, *, exact: bool) -> bool:
        """Whether a graph runs ``rows`` rows; those of an exact job are not filled up."""
        return rows in self._graphs if exact else rows <= max(self._graphs)

    def __call__(self, values: Values, *, exact: bool = False) -> tuple[torch.Tensor]:
        """What the denoiser returns for ``values``.

        The bytes of an ``exact`` job do not depend on when a compile ended.
        """
        bucket = self.bucket(values)
        eager = self._graphs[bucket]
        return self.replay(eager if exact else self._compiled.get(bucket, eager), values)

    def bucket(self, values: Values) -> int:
        """The rows of the graphs for ``values``, to which they are filled up."""
        rows = self._signature.rows(values)
        return min(each for each in self._graphs if each >= rows)

    def eager(self, values: Values) -> torch.Tensor:
        """What the denoiser returns for ``values`` without a graph."""
        output: torch.Tensor = self._denoiser(**self._signature.arguments(values))[0]
        return output

    def replay(self, graph: Graph, values: Values) -> tuple[torch.Tensor]:
        """What ``graph``, of the bucket of ``values``, computes of them."""
        rows = self._signature.rows(values)
        for name, kind in self._signature.kinds.items():
            if isinstance(kind, TensorKind):
                self._rows_of(name, rows).copy_(values[name])
        graph.replay()
        # A copy: a scheduler may keep it, and the next batch overwrites the graph's own.
        return (graph.output[:rows].clone(),)

    @property
    def _tensors(self) -> list[torch.Tensor]:
        return [each for each in self._buffers.values() if isinstance(each, torch.Tensor)]

    def _values_of(self, rows: int) -> Values:
        return {name: self._rows_of(name, rows) for name in self._buffers}

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


def compiled_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """Those of ``buckets`` that are compiled, each for minutes: of a lone image, and the widest."""
    return tuple(sorted({rows for rows in buckets if rows in (LONE_ROWS, max(buckets))}))


def record_graphs(model: Model, recorder: Recorder) -> int:
    """Let ``model`` run graphs, if its ``forms`` say so; returns the bytes that they take.

    Each is compared with the eager denoiser. If the memory ends, there are fewer of them; if
    nothing can be recorded, the denoiser stays eager. Both are logged. There is a ``pause`` after
    each.
    """
    forms = model.forms
    if forms is None or not forms.graph_rows:
        return 0
    graphed = _recorded(model.info.id, forms, recorder)
    if graphed is None:
        return 0
    forms.other = graphed
    forms.graph_bytes += graphed.buffer_bytes
    model.info = model.info.with_runtime(denoiser=DenoiserForm.GRAPHS)
    taken = forms.graph_bytes
    log.info("graphs recorded", model=model.info.id, rows=graphed.recorded_rows, bytes=taken)
    return taken


def record_compiled(
    model: Model, forms: DenoiserForms, rows: int, compiled: Callable[[Values], Any]
) -> None:
    """Let ``model``, which runs graphs, run ``compiled`` in a graph for batches of ``rows`` rows.

    Raises ``WrongOutput`` if the graph does not compute what the denoiser does, and what torch
    raises; then all stays as it was.
    """
    graphed = forms.other
    assert isinstance(graphed, GraphedDenoiser), "its task is usable"
    arguments = forms.example(rows)
    values = forms.signature.arranged(arguments)
    assert values is not None, "they were compared"
    with graph_memory_counted(forms, graphed.device):
        graph = graphed.recorded_compiled(rows, compiled)
        forms.check(graphed.replay(graph, values)[0], forms.denoiser(**arguments)[0])
    graphed.add_compiled(rows, graph)
    log.info("graph recorded", model=model.info.id, rows=rows)


@contextmanager
def graph_memory_counted(forms: DenoiserForms, device: torch.device) -> Iterator[None]:
    """Add to ``graph_bytes`` what the pools of graphs take of ``device`` meanwhile."""
    before = graph_pool_bytes(device)
    try:
        yield
    finally:
        forms.graph_bytes += max(0, graph_pool_bytes(device) - before)


def contain_failure(
    error: Exception, recorded: MutableMapping[Any, Any], model: str, event: str
) -> None:
    """Log that no more is recorded after ``error``, and why; raises that of a lost device.

    Without memory for a graph those of ``recorded`` stay; what computes something else once is not
    trusted any more.
    """
    if is_fatal(error):
        raise error
    if not is_out_of_memory(error):
        recorded.clear()
    log.warning(event, model=model, why=one_line(error))


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
            with graph_memory_counted(forms, graphed.device):
                graph = graphed.recorded(rows)
                forms.check(graphed.replay(graph, values)[0], forms.denoiser(**arguments)[0])
            graphed.add(rows, graph)
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
        pause()
    return graphed if graphed is not None and graphed.recorded_rows else None
