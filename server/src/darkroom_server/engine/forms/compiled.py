"""A denoiser that was compiled for any number of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from darkroom_server.engine.forms.signature import Values


@dataclass(frozen=True, slots=True)
class CompiledDenoiser:
    """Calls ``run``, which takes from ``least_rows`` to ``most_rows`` rows.

    It reads wrong values from tensors that do not lie in memory as its signature says.
    """

    run: Callable[[Values], Any]
    least_rows: int
    most_rows: int

    def takes(self, rows: int, *, exact: bool) -> bool:
        """Whether it runs a batch of ``rows`` rows; ``exact`` if they are of an exact job.

        Exact jobs run eagerly, so that their bytes do not depend on when a compile ended.
        """
        return not exact and self.least_rows <= rows <= self.most_rows

    def __call__(self, values: Values) -> Any:
        """What the denoiser returns for ``values``."""
        return self.run(values)
