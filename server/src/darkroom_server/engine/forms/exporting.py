"""Exports a module for one or any number of rows, and packages what the compiler makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from darkroom_server.engine.forms.signature import EXAMPLE_ROWS, TensorKind

LEAST_ROWS, MOST_ROWS = 2, 1024
"""Of a call. The compiler treats a single row as a case of its own."""


def exported(
    module: torch.nn.Module,
    kinds: Mapping[str, Any],
    layout: torch.memory_format,
    *,
    rows: int | None = None,
    device: str = "cpu",
) -> ExportedProgram:
    """The graph of ``module``, which is on ``device``, for ``rows`` rows; None: for any number.

    ``kinds`` are its arguments by name, with a kind in place of each value; their four-dimensional
    tensors have ``layout``. Raises any error for a module that cannot be exported.
    """

    def value(kind: Any) -> Any:
        made = example(kind, EXAMPLE_ROWS if rows is None else rows, layout)
        return made.to(device) if isinstance(made, torch.Tensor) else made

    dynamic = pytree.tree_map(_dynamic, kinds) if rows is None else None
    with torch.no_grad():
        return export(module, (), pytree.tree_map(value, kinds), dynamic_shapes=dynamic)


def row_range(program: ExportedProgram) -> tuple[int, int]:
    """The rows that the graph takes. Raises ``ValueError`` if it takes one number only."""
    ranges = list(program.range_constraints.values())
    if not ranges:
        raise ValueError(f"the graph is for {EXAMPLE_ROWS} rows only")
    return max(int(each.lower) for each in ranges), min(int(each.upper) for each in ranges)


def write_package(program: ExportedProgram, file: Path, rows: int | None = None) -> tuple[int, int]:
    """Compile ``program`` into ``file``; returns the rows that it takes. Raises any error.

    ``rows`` are those of a graph for one number of rows.
    """
    least, most = row_range(program) if rows is None else (rows, rows)
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(file),
        inductor_configs={
            # The engine has them in memory.
            "aot_inductor.package_constants_in_so": False,
            # Else the values of short vectors, which these weights do not have, are in the code.
            "always_keep_tensor_constants": True,
            "aot_inductor.metadata": {"least_rows": str(least), "most_rows": str(most)},
        },
    )
    return least, most


def example(kind: Any, rows: int, layout: torch.memory_format) -> Any:
    """A value of ``kind`` with ``rows`` rows."""
    if not isinstance(kind, TensorKind):
        return kind
    shape = kind.of_rows(rows)
    if not kind.dtype.is_floating_point:
        return torch.ones(shape, dtype=kind.dtype)
    value = torch.rand(shape).to(kind.dtype)
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value


def _dynamic(kind: Any) -> Any:
    if not isinstance(kind, TensorKind):
        return None
    rows = Dim.AUTO(min=LEAST_ROWS, max=MOST_ROWS)
    return {place: rows for place, size in enumerate(kind.shape) if size is None}
