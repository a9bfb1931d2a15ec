"""How families without a UNet run in half precision; UNets run in float16.

The reasons are those of diffusers' code and documentation, version 0.42.
"""

from dataclasses import replace

import torch

from darkroom_server.engine.warmup.formats import HalfPrecision

NOT_KNOWN_TO_HOLD = HalfPrecision(
    dtype=torch.bfloat16,
    float16_risk="the model is not known to hold in float16",
    slices_attention=False,
)
"""A transformer that diffusers' documentation runs in bfloat16 only."""

HOLDS_IN_FLOAT16 = replace(NOT_KNOWN_TO_HOLD, float16_risk="")
"""A transformer that diffusers' documentation runs in float16."""

CLIPPED_IN_FLOAT16 = replace(
    NOT_KNOWN_TO_HOLD,
    float16_risk="the model's values overflow in float16, where diffusers clips them",
)
"""A transformer whose code clips its values to float16's largest, 65504."""

LINEAR_ATTENTION = replace(
    CLIPPED_IN_FLOAT16,
    autocast_risk="it would undo the float32 of the model's linear attention",
)
"""The same, with attention that multiplies its keys with its values, in float32."""

UNDESCRIBED = replace(
    NOT_KNOWN_TO_HOLD,
    autocast_risk="it is not known what the pipeline must compute in float32",
)
"""A pipeline that nobody has described: as diffusers runs it, in bfloat16."""
