"""Leaves components in the host's memory, from where each layer is copied for its calls."""

from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from darkroom_server.core.quantization import Offload
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.presets import Runtime


def offloaded_parts(family: type[Family] | Family, runtime: Runtime) -> frozenset[str]:
    """The names of the components that stay in the host's memory."""
    if runtime.offload is Offload.NONE:
        return frozenset()
    encoders = {name for name in family.components if name.startswith("text_encoder")}
    if runtime.offload is Offload.GROUP:
        encoders.add(family.denoiser_name)
    return frozenset(encoders)


def offload(family: Family, runtime: Runtime) -> None:
    """Let the layers of those components be copied to the device, and dropped there afterwards.

    On a GPU the next layer is copied while one computes. Their weights are on the CPU now.
    """
    for name in sorted(offloaded_parts(family, runtime)):
        part: Any = getattr(family.pipeline, name, None)
        if part is not None:
            apply_group_offloading(
                part,
                onload_device=runtime.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=runtime.device.type == "cuda",
            )
