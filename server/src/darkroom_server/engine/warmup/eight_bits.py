"""Weights in eight bits: half the memory, and one more kernel for each weight of a batch.

A layer casts its weights for each of its calls and forgets the result. It cannot keep the result:
that is the memory which the storage saves. Nor can it compute from eight bits: torch multiplies
``float8`` by ``float8`` only, for which the activations would be rounded too.
"""

from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.layerwise_casting import _LAYERWISE_CASTING_HOOK

STORED = torch.float8_e4m3fn


def store_in_eight_bits(module: Any, dtype: torch.dtype) -> None:
    """Store the weights of ``module`` in eight bits, from which each layer computes in ``dtype``.

    diffusers chooses the layers: all but those that are precision-critical, such as norms.
    """
    module.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=dtype)
    for layer in module.modules():
        registry = getattr(layer, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_LAYERWISE_CASTING_HOOK)
        if hook is not None:
            _keep_stored(layer, hook, dtype)


def _keep_stored(layer: torch.nn.Module, hook: Any, dtype: torch.dtype) -> None:
    """Let ``layer`` keep its stored weights during a call.

    diffusers' hook replaces them, and casts the result back after the call: a kernel more for each
    weight. The hook stays, because a model asks it for the dtype that it computes in.
    """
    compute = hook.fn_ref.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        stored = dict(layer._parameters)
        cast = {name: each.to(dtype) for name, each in stored.items() if each is not None}
        layer._parameters.update(cast)  # type: ignore[arg-type]
        try:
            return compute(*args, **kwargs)
        finally:
            layer._parameters.update(stored)

    nothing = ModelHook()
    hook.fn_ref.pre_forward, hook.fn_ref.post_forward = nothing.pre_forward, nothing.post_forward
    hook.fn_ref.forward = forward
