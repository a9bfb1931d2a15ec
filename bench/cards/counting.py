"""Counts bytes of weights and of calls, of modules on the meta device: nothing is computed."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import diffusers
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cards.models import DTYPE, CardModel, Make
from darkroom_server.core.quantization import Quantization

HALF = DTYPE.itemsize
"""Bytes of a weight in 16 bits."""

NF4_BLOCK = 64
"""Weights that share a scale of 4 bytes, as bitsandbytes packs them by default."""

PACKED = (Quantization.INT8, Quantization.NF4, Quantization.FP8, Quantization.FP8_DYNAMIC)
FOR_ENCODERS = (Quantization.INT8, Quantization.NF4)
"""The kinds that are for text encoders too."""


def on_meta(make: Make) -> Any:
    """What ``make`` makes, in 16 bits and without memory."""
    with torch.device("meta"):
        return make().to(DTYPE).eval().requires_grad_(False)


def weight_bytes(module: torch.nn.Module) -> int:
    """The bytes of the weights of ``module``."""
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def packed_bytes(module: torch.nn.Module, kind: Quantization) -> int:
    """The bytes of the weights of ``module``, which is in 16 bits, once ``kind`` packed them."""
    if kind is Quantization.FP8:
        return _cast_bytes(module)
    return weight_bytes(module) - sum(
        layer.weight.nbytes - _packed_linear(layer, kind) for layer in _linear_layers(module)
    )


def _cast_bytes(module: Any) -> int:
    """Once ``module`` has the casts that the server uses, which leave some layers as they are."""
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)
    return weight_bytes(module)


def _linear_layers(module: Any) -> Iterator[torch.nn.Linear]:
    """The layers that quantisers pack: all linear ones but the head of a language model."""
    of_language = hasattr(module, "get_output_embeddings")
    head = module.get_output_embeddings() if of_language else None
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            yield layer


def _packed_linear(layer: torch.nn.Linear, kind: Quantization) -> int:
    """The bytes of the weight of ``layer``, and of its scales."""
    count, outputs = layer.weight.numel(), layer.out_features
    match kind:
        case Quantization.INT8:
            return count + HALF * outputs
        case Quantization.NF4:
            return count // 2 + 4 * count // NF4_BLOCK
        case Quantization.FP8_DYNAMIC if not (outputs % 16 or layer.in_features % 16):
            return count + 4 * outputs
    return layer.weight.nbytes


def largest_layer(module: torch.nn.Module) -> int:
    """The bytes of the layer with the most, which offload copies to the device as a whole."""
    leaves = (each for each in module.modules() if not any(True for _ in each.children()))
    return max(weight_bytes(leaf) for leaf in leaves)


def vae_bytes(model: CardModel, vae: Any) -> int:
    """The bytes of the weights of ``vae``, which some families run in 32 bits."""
    upcast = hasattr(getattr(diffusers, model.pipeline), "upcast_vae")
    return weight_bytes(vae) * (2 if upcast and vae.config.force_upcast else 1)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that work makes, at once, besides those that are ``there`` before.

    What a kernel takes for itself is not seen.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._holders: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._there = {each.untyped_storage()._cdata for each in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and hold what it returns until nothing uses it."""
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._hold(each)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._there:
            return
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._live -= self._sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Attention as one kernel, as on a GPU: the matrix of all pairs of tokens never exists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **given}
        query, value = named["query"], named["value"]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def peak_bytes(
    module: torch.nn.Module, call: Callable[[], object], inputs: Iterable[torch.Tensor] = ()
) -> int:
    """The most bytes of ``call`` of ``module`` at once, besides its weights and ``inputs``."""
    there = (*module.parameters(), *module.buffers(), *inputs)
    with torch.inference_mode(), LiveBytes(there) as counted, _FusedAttention():
        call()
    peak: int = counted.peak
    return peak


def batch_bytes(model: CardModel, denoiser: Any, rows: int) -> int:
    """Bytes of one denoiser call of ``rows`` rows, with its inputs; 0 if it is not counted."""
    if model.inputs is None:
        return 0
    inputs = model.inputs(rows)
    given = [each for each in tree_leaves(inputs) if isinstance(each, torch.Tensor)]
    peak = peak_bytes(denoiser, lambda: denoiser(**inputs, return_dict=False), given)
    return sum(each.nbytes for each in given) + peak


def decode_bytes(model: CardModel, vae: Any) -> int:
    """Bytes of the decode of one image of the default size, as a whole."""
    latents = torch.empty(model.latents, dtype=DTYPE, device="meta")
    times = vae_bytes(model, vae) // weight_bytes(vae)
    return times * peak_bytes(vae, lambda: vae.decode(latents, return_dict=False), [latents])
