"""The process that compiles one denoiser: ``python -m ... PARENT FILE [GPU]``, its task on stdin.

``PARENT`` is the id of the process that waits for it, ``FILE`` the package to write, ``GPU`` the
index of the one to compile on. The weights have no values: on a CPU, memory that is not touched
takes no room.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from darkroom_server.engine.failures import one_line
from darkroom_server.engine.forms.compile_blocks import compile_blocks, repeated_blocks
from darkroom_server.engine.forms.exporting import exported, write_package
from darkroom_server.engine.forms.signature import nested, read_kind
from darkroom_server.engine.main import die_with


def main() -> None:
    """Compile what stdin describes."""
    die_with(parent=int(sys.argv[1]))
    for gpu in sys.argv[3:]:
        torch.cuda.set_device(int(gpu))
    compile_denoiser(json.load(sys.stdin), Path(sys.argv[2]))


def compile_denoiser(task: dict[str, Any], file: Path) -> None:
    """Write the package of ``task``, the description of a ``CompileTask``, to ``file``.

    If the denoiser cannot be compiled as a whole for any number of rows, its repeated blocks are.
    Raises any error if neither can.
    """
    rows, device = task["rows"], task["device"]
    torch.set_num_threads(task["threads"])
    layout = torch.channels_last if task["channels_last"] else torch.contiguous_format
    kinds = {name: read_kind(each) for name, each in task["arguments"].items()}
    denoiser = denoiser_of(task, layout)
    try:
        program = exported(denoiser, nested(kinds, kinds), layout, rows=rows, device=device)
        write_package(program, file, rows)
    except Exception as error:
        if rows is not None or not repeated_blocks(denoiser):
            raise
        try:
            compile_blocks(denoiser, kinds, layout, file)
        except Exception as of_blocks:  # noqa: BLE001 - both are reported.
            both = f"{one_line(error)}; neither can its blocks: {one_line(of_blocks)}"
            raise RuntimeError(f"the whole cannot be compiled: {both}") from error


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
                empty = torch.empty(
                    weight.shape, dtype=dtype, device=task["device"], memory_format=layout_here
                )
                part._parameters[name] = nn.Parameter(empty, False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(_dtype_of(task, f"{prefix}.{name}".lstrip(".")))
    return denoiser.to(task["device"]).eval()


def _dtype_of(task: dict[str, Any], name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, task["other_dtypes"].get(name, task["dtype"]))
    return dtype


if __name__ == "__main__":
    main()
