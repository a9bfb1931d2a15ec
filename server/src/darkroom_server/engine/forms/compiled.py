"""A denoiser that was compiled for one or any number of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darkroom_server.engine.forms.signature import Values


@dataclass(frozen=True, slots=True)
class CompiledDenoiser:
    """Calls ``run``, which takes from ``least_rows`` to ``most_rows`` rows.

    It reads wrong values from tensors that do not lie in memory as its signature says.
    ``by_blocks``: only its repeated blocks are compiled.
    """

    run: Callable[[Values], Any]
    least_rows: int
    most_rows: int
    by_blocks: bool = False

    def takes(self, rows: int, *, exact: bool) -> bool:
        """Whether it runs a batch of ``rows`` rows; ``exact`` if they are of an exact job.

        Exact jobs run eagerly, so that their bytes do not depend on when a compile ended.
        """
        return not exact and self.least_rows <= rows <= self.most_rows

    def __call__(self, values: Values, *, exact: bool = False) -> Any:
        """What the denoiser returns for ``values``, which are not of an ``exact`` job."""
        return self.run(values)


def open_package(file: Path, module: Any, *, for_graphs: bool = False) -> Any:
    """The loader of the package in ``file``, with the weights of ``module``, which it shares.

    ``for_graphs``: its calls can be recorded, and no two of them run at once. Raises any error for
    a file that cannot be used.
    """
    # Not by ``torch._inductor.aoti_load_package``: its imports take longer than many batches.
    # The third argument leaves out the events by which calls share a model; a recorded one cannot
    # ask for them.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", for_graphs, 1, -1)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    used = {name: _unowned(weights[name]) for name in loader.get_constant_fqns()}
    loader.load_constants(used, False, True, True)
    return loader


def _unowned(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` without a share in its memory: a package never lets go of a tensor it was given.

    So the package runs only while its module has the weights.
    """
    at = int(weight.storage_offset()) * weight.element_size()
    storage = torch._C._construct_storage_from_data_pointer(
        weight.data_ptr(), weight.device, int(weight.untyped_storage().nbytes()) - at
    )
    tensor = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return tensor.set_(storage, 0, weight.shape, weight.stride())
