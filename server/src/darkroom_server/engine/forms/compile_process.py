"""The process that compiles one denoiser: ``python -m ... PARENT FILE``, its task on stdin.

``PARENT`` is the id of the process that waits for it, ``FILE`` the package to write. The
weights have no values, and memory that is not touched takes no room.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from accelerate import init_empty_weights
from torch import nn
from torch.export import Dim, ExportedProgram, export

from darkroom_server.engine.forms.signature import EXAMPLE_ROWS, TensorKind, nested
from darkroom_server.engine.main import die_with

LEAST_ROWS, MOST_ROWS = 2, 1024
"""Of a call. The compiler treats a single row as a case of its own."""


def main() -> None:
    """Compile what stdin describes."""
    die_with(parent=int(sys.argv[1]))
    compile_denoiser(json.load(sys.stdin), Path(sys.argv[2]))


def compile_denoiser(task: dict[str, Any], file: Path) -> None:
    """Write the package of ``task``, the description of a ``CompileTask``, to ``file``."""
    torch.set_num_threads(task["threads"])
    program, least, most = exported(task)
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


def exported(task: dict[str, Any]) -> tuple[ExportedProgram, int, int]:
    """The graph of the denoiser for any number of rows, and the least and the most of them."""
    kinds = {name: _kind(each) for name, each in task["arguments"].items()}
    values = {name: _example(kind) for name, kind in kinds.items()}
    layout = torch.channels_last if task["channels_last"] else torch.contiguous_format
    values = {name: _laid_out(value, layout) for name, value in values.items()}
    dynamic = {name: _dynamic(kind) for name, kind in kinds.items()}
    with torch.no_grad():
        program = export(
            denoiser_of(task, layout),
            (),
            nested(kinds, values),
            dynamic_shapes=nested(kinds, dynamic),
        )
    return program, *_row_range(program)


def denoiser_of(task: dict[str, Any], layout: torch.memory_format) -> nn.Module:
    """The denoiser with weights of the right types and layouts, and no values."""
    kind = getattr(importlib.import_module(task["module"]), task["class"])
    with init_empty_weights(include_buffers=False):
        denoiser: nn.Module = kind.from_config(task["config"])
    for prefix, part in denoiser.named_modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                dtype = _dtype_of(task, f"{prefix}.{name}".lstrip("."))
                layout_here = layout if weight.ndim == 4 else torch.contiguous_format
                empty = torch.empty(weight.shape, dtype=dtype, memory_format=layout_here)
                part._parameters[name] = nn.Parameter(empty, False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(_dtype_of(task, f"{prefix}.{name}".lstrip(".")))
    return denoiser.eval()


def _dtype_of(task: dict[str, Any], name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, task["other_dtypes"].get(name, task["dtype"]))
    return dtype


def _laid_out(value: Any, layout: torch.memory_format) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return value
    return value.contiguous(memory_format=layout)


def _kind(described: dict[str, Any]) -> Any:
    if "value" in described:
        return described["value"]
    return TensorKind(tuple(described["shape"]), getattr(torch, described["dtype"]))


def _example(kind: Any) -> Any:
    if not isinstance(kind, TensorKind):
        return kind
    shape = kind.of_rows(EXAMPLE_ROWS)
    if kind.dtype.is_floating_point:
        return torch.rand(shape).to(kind.dtype)
    return torch.ones(shape, dtype=kind.dtype)


def _dynamic(kind: Any) -> Any:
    if not isinstance(kind, TensorKind):
        return None
    rows = Dim.AUTO(min=LEAST_ROWS, max=MOST_ROWS)
    return {place: rows for place, size in enumerate(kind.shape) if size is None}


def _row_range(program: ExportedProgram) -> tuple[int, int]:
    """The rows that the graph takes. Raises ``ValueError`` if it takes one number only."""
    ranges = list(program.range_constraints.values())
    if not ranges:
        raise ValueError(f"the graph is for {EXAMPLE_ROWS} rows only")
    return max(int(each.lower) for each in ranges), min(int(each.upper) for each in ranges)


if __name__ == "__main__":
    main()
