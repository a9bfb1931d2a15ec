"""The forms of one model's denoiser, and which of them a batch runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from darkroom_server.core.engine_config import Compile
from darkroom_server.engine.forms.signature import Signature, Values, largest_error
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.pipelines.arguments import Arguments
from darkroom_server.engine.sample import Sample

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""The largest error of a row beside the eager denoiser, relative to the row's norm, by dtype.

Half precision rounds each product to 8 or 11 bits, and another form rounds at other places.
"""


class WrongOutput(Exception):
    """Another form of a denoiser does not compute what the eager one does."""


class OtherForm(Protocol):
    """Takes the place of the eager denoiser for some of its calls."""

    def takes(self, rows: int, *, exact: bool) -> bool:
        """Whether it runs a batch of ``rows`` rows; ``exact`` if they are of an exact job."""

    def __call__(self, values: Values, *, exact: bool = False) -> Any:
        """What the denoiser returns for ``values``, which are arranged as in its signature.

        It takes their rows, ``exact`` if they are of an exact job.
        """


@dataclass(slots=True, kw_only=True)
class DenoiserForms:
    """Runs ``denoiser`` eagerly, or in its ``other`` form once that is set.

    ``signature`` are the calls that another form may take. ``inputs`` makes arguments of such calls
    for a number of rows. ``tasks`` compile the denoiser, ``when`` that says; without any it is not
    compiled. ``graph_rows`` are the rows of the graphs to record, none on a CPU. ``adapted`` runs
    rows with adapters that ``other`` takes, and ``reshaped`` calls of other shapes than in the
    signature, if they do not return None. ``to_record`` records a graph of calls that have come
    often: between two batches, so that no job pays for it. ``graph_bytes`` are what graphs took of
    the device's memory and ``take_graph_bytes`` has not returned yet.
    """

    denoiser: Any
    dtype: torch.dtype
    signature: Signature
    inputs: Callable[[int], Arguments]
    tasks: tuple[CompileTask, ...] = ()
    when: Compile = Compile.OFF
    graph_rows: tuple[int, ...] = ()
    other: OtherForm | None = None
    adapted: Callable[[Values], Any] | None = None
    reshaped: Callable[[Arguments], Any] | None = None
    to_record: Callable[[], None] | None = None
    graph_bytes: int = 0

    def run(self, given: Arguments, samples: Sequence[Sample]) -> Any:
        """What the denoiser returns for ``given``, the call of a batch of ``samples``."""
        found = None if self.other is None else self._run_other(self.other, given, samples)
        return self.denoiser(**given) if found is None else found

    def _run_other(self, other: OtherForm, given: Arguments, samples: Sequence[Sample]) -> Any:
        """As ``run``, None if the batch is to run eagerly."""
        exact = any(sample.job.exact for sample in samples)
        adapted = any(sample.job.active_loras for sample in samples)
        # When such a graph is there depends on earlier batches, which exact jobs must not.
        if adapted and (exact or self.adapted is None):
            return None
        values = self.signature.arranged(given)
        if values is None:
            if self.reshaped is None or adapted or exact:
                return None
            return self.reshaped(given)
        if not other.takes(self.signature.rows(values), exact=exact):
            return None
        if adapted:
            assert self.adapted is not None
            return self.adapted(values)
        return other(values, exact=exact)

    def record_pending(self) -> None:
        """Record the graph that waits for it. Raises an error of a lost device."""
        if self.to_record is not None:
            record, self.to_record = self.to_record, None
            record()

    def take_graph_bytes(self) -> int:
        """The bytes that graphs have taken since the last call."""
        taken, self.graph_bytes = self.graph_bytes, 0
        return taken

    def drop_others(self) -> None:
        """Run eagerly from now on; the memory of graphs and of compiled code is freed."""
        self.other = self.adapted = self.reshaped = self.to_record = None

    def example(self, rows: int) -> dict[str, Any]:
        """Arguments of a call whose rows differ in every value, the timestep included."""
        generator = torch.Generator().manual_seed(rows)
        return self.signature.distinct_rows(self.inputs(rows), generator)

    def check(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare an output with the ``expected`` one. Raises ``WrongOutput`` if it is wrong."""
        error, tolerance = largest_error(found, expected), TOLERANCES[self.dtype]
        if not error <= tolerance:
            raise WrongOutput(f"its output is wrong (error {error:.2g}, at most {tolerance:g})")


def run_denoiser(
    forms: DenoiserForms | None, denoiser: Any, given: Arguments, samples: Sequence[Sample]
) -> Any:
    """As ``DenoiserForms.run``; ``denoiser`` runs eagerly for a model without ``forms``."""
    return denoiser(**given) if forms is None else forms.run(given, samples)
