"""A pipeline's UNet in the form that Darkroom compiled for this machine."""

from pathlib import Path
from typing import Any

import torch

from darkroom_server.engine.forms.signature import (
    EXAMPLE_ROWS,
    Kinds,
    Signature,
    TensorKind,
    largest_error,
)
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import Inductor
from darkroom_server.engine.warmup.formats import MemoryFormat

LARGEST_ERROR = 0.05
"""Of a row, relative to its norm, beside the eager UNet."""


def use_compiled(pipeline: Any, package: str, memory_format: MemoryFormat) -> None:
    """Let the UNet of ``pipeline`` run ``package``, which is for its default size.

    Calls that the package does not take, as of another size, run eagerly. Raises ``RuntimeError``
    if it does not compute what the UNet does.
    """
    unet = pipeline.unet
    side, dtype = unet.config.sample_size, memory_format.dtype
    tokens = pipeline.tokenizer.model_max_length
    kinds: Kinds = {
        "sample": TensorKind((None, unet.config.in_channels, side, side), dtype),
        "timestep": TensorKind((None,), torch.float32),
        "encoder_hidden_states": TensorKind((None, tokens, unet.config.cross_attention_dim), dtype),
        "return_dict": False,
    }
    signature = Signature(kinds, memory_format.layout)
    compiled = Inductor().load(CompileTask("", kinds), Path(package), unet)
    eager = unet.forward

    def forward(
        sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **options: Any
    ) -> Any:
        given = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            **options,
        }
        values = signature.arranged(given)
        if values is None or not compiled.takes(len(sample), exact=False):
            return eager(**given)
        return compiled(values)

    with torch.inference_mode():
        example = {
            name: torch.randn(kind.of_rows(EXAMPLE_ROWS)).to(kind.dtype)
            for name, kind in kinds.items()
            if isinstance(kind, TensorKind)
        }
        example["timestep"] = torch.full((EXAMPLE_ROWS,), 500.0)
        values = signature.arranged({**example, "return_dict": False})
        assert values is not None
        error = largest_error(compiled(values)[0], eager(**example, return_dict=False)[0])
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"{package} is not the UNet of this pipeline: its error is {error:.2g}")
    unet.forward = forward
