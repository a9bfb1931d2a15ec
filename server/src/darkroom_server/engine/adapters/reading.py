"""Reads the file of a LoRA adapter: diffusers', kohya's or PEFT's layout, into a model's layers."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import structlog
import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from torch import nn

from darkroom_server.engine.adapters.header import read_header
from darkroom_server.engine.adapters.weights import AdapterWeights, LayerWeights

log = structlog.get_logger(__name__)

METADATA = "lora_adapter_metadata"
"""The key of a file's metadata under which diffusers keeps PEFT's configuration."""

PEFT_PREFIX = "base_model.model."
"""The start of each key in a file that PEFT wrote."""


class AdapterMismatch(ValueError):
    """The adapter cannot be added to this model; the text says why, for the operator."""


def read_headers(file: Path, id: str, pipeline: Any) -> AdapterWeights:
    """The shapes of an adapter's weights; the tensors but scalars are on the meta device.

    Raises ``AdapterMismatch``, and ``OSError`` if the file cannot be read.
    """
    with _explained(id):
        tensors, written = read_header(file)
        try:
            return _adapter(id, tensors, configuration(written, file), pipeline)
        except (NotImplementedError, RuntimeError):
            # Some layouts are distinguished by their values.
            return parse_adapter(file.read_bytes(), file, id, pipeline)


def parse_adapter(data: bytes, file: Path, id: str, pipeline: Any) -> AdapterWeights:
    """The weights in ``data``, which was read from ``file``, in the file's data type.

    Raises ``AdapterMismatch``, and ``OSError`` if PEFT's file beside it cannot be read.
    """
    with _explained(id):
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _adapter(id, tensors, configuration(header.get("__metadata__"), file), pipeline)


@contextmanager
def _explained(id: str) -> Iterator[None]:
    """Raise ``AdapterMismatch`` for all that a damaged file can cause: the engine goes on."""
    try:
        yield
    except (AdapterMismatch, OSError):
        raise
    except SafetensorError as error:
        raise AdapterMismatch(f"it is not a safetensors file ({error})") from error
    except Exception as error:
        # diffusers raises anything for a file that it cannot convert.
        log.exception("adapter cannot be converted", adapter=id)
        raise AdapterMismatch(f"diffusers cannot convert it ({type(error).__name__})") from error


def configuration(written: Mapping[str, str] | None, file: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter, by component and option; empty if there is none.

    It is in the metadata of the file, ``written``, or as PEFT saves it in a file beside it.
    Raises ``AdapterMismatch``, and ``OSError``.
    """
    text = (written or {}).get(METADATA)
    beside = file.with_name("adapter_config.json")
    try:
        if text:
            return dict(json.loads(text))
        if not beside.is_file():
            return {}
        options = json.loads(beside.read_text())
        return {f"{PEFT_PREFIX}{name}": value for name, value in options.items()}
    except (ValueError, TypeError, AttributeError) as error:
        place = "its metadata" if text else beside.name
        raise AdapterMismatch(f"PEFT's configuration in {place} is damaged") from error


def _adapter(
    id: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], pipeline: Any
) -> AdapterWeights:
    if not hasattr(pipeline, "lora_state_dict"):
        raise AdapterMismatch("diffusers has no LoRA loader for this pipeline")
    if any("dora_scale" in key for key in tensors):
        raise AdapterMismatch("it is a DoRA adapter in kohya's layout, which diffusers cannot read")
    converted = _convert(tensors, pipeline, metadata)
    if not converted:
        raise AdapterMismatch("it has no LoRA weights for a component of this model")
    for name, layers in converted.items():
        for layer, weights in layers.items():
            _check(getattr(pipeline, name), f"{name}.{layer}", layer, weights)
    return AdapterWeights(id=id, components=converted)


def _convert(
    tensors: dict[str, torch.Tensor], pipeline: Any, metadata: dict[str, Any]
) -> dict[str, dict[str, LayerWeights]]:
    """The layers of each component, by diffusers' own conversions of keys and weights."""
    denoiser = next(name for name in ("transformer", "unet") if hasattr(pipeline, name))
    modules = {name for name, _ in getattr(pipeline, denoiser).named_modules()}
    if all(_module_of(key.removeprefix(PEFT_PREFIX)) in modules for key in tensors):
        # PEFT names the layers of the module alone.
        tensors = {f"{denoiser}.{k.removeprefix(PEFT_PREFIX)}": v for k, v in tensors.items()}
        metadata = {f"{denoiser}.{k.removeprefix(PEFT_PREFIX)}": v for k, v in metadata.items()}
    options: dict[str, Any] = {"return_lora_metadata": True, "return_alphas": True}
    if denoiser == "unet":
        options["unet_config"] = pipeline.unet.config
    found: dict[str, dict[str, LayerWeights]] = {}
    try:
        state, *rest = type(pipeline).lora_state_dict(tensors, **options)
        # The other one is PEFT's configuration, which is read above.
        alphas: Mapping[str, Any] = (rest[0] or {}) if len(rest) > 1 else {}
        for name in type(pipeline)._lora_loadable_modules:
            module, is_encoder = getattr(pipeline, name, None), name != denoiser
            part = _of_component(name, state)
            if not part or module is None:
                continue
            found[name] = _layers(
                name,
                _as_peft(part, module, is_encoder=is_encoder),
                _of_component(name, metadata),
                _alphas(_of_component(name, alphas), module, is_encoder=is_encoder),
            )
    except (KeyError, ValueError, IndexError) as error:
        if isinstance(error, AdapterMismatch):
            raise
        raise AdapterMismatch(f"diffusers cannot convert it ({error})") from error
    return found


def _of_component(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}


def _alphas(given: Mapping[str, Any], module: Any, *, is_encoder: bool) -> dict[str, float]:
    """The alpha of each layer; diffusers names some by the layer, some by its weights."""
    by_key = {key.removesuffix(".alpha"): float(value) for key, value in given.items()}
    by_weights: Any = {key: value for key, value in by_key.items() if key.endswith(".weight")}
    if by_weights:
        by_weights = _as_peft(by_weights, module, is_encoder=is_encoder)
    alphas = {key: value for key, value in by_key.items() if not key.endswith(".weight")}
    return alphas | {key.partition(".lora_")[0]: value for key, value in by_weights.items()}


def _as_peft(
    state: dict[str, torch.Tensor], module: Any, *, is_encoder: bool
) -> dict[str, torch.Tensor]:
    """``state`` with PEFT's names, as diffusers converts it when it loads an adapter."""
    if not is_encoder:
        peft = "lora_A" in next(iter(state))
        return state if peft else convert_unet_state_dict_to_peft(state)
    state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    if hasattr(module, "text_model"):
        return state
    # Newer versions of transformers have no such level in CLIP.
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def _layers(
    component: str,
    state: Mapping[str, torch.Tensor],
    configuration: Mapping[str, Any],
    alphas: Mapping[str, float],
) -> dict[str, LayerWeights]:
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        layer, _, kind = key.partition(".lora_")
        by_layer.setdefault(layer, {})[kind.removesuffix(".weight")] = value
    layers = {}
    for name, parts in by_layer.items():
        if parts.keys() - {"magnitude_vector"} != {"A", "B"}:
            raise AdapterMismatch(
                f"{component}.{name} has {', '.join(sorted(parts)) or 'no'} weights, "
                "which are not those of a LoRA layer"
            )
        down, up = parts["A"], parts["B"]
        scale = _scale(name, down.shape[0], configuration, alphas.get(name))
        layers[name] = LayerWeights(
            down=down,
            up=(up if scale == 1 else (up.float() * scale)).reshape(up.shape[0], -1),
            magnitude=parts.get("magnitude_vector"),
        )
    return layers


def _scale(layer: str, rank: int, configuration: Mapping[str, Any], alpha: float | None) -> float:
    """Alpha by rank; without an alpha anywhere 1, as in diffusers."""
    if alpha is not None:
        return alpha / rank
    if not configuration:
        return 1.0
    patterns: Mapping[str, float] = configuration.get("alpha_pattern") or {}
    # As PEFT: a pattern is a regular expression for the end of the layer's name.
    matching = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", layer))
    chosen = float(next(matching, configuration["lora_alpha"]))
    return chosen / (rank**0.5 if configuration.get("use_rslora") else rank)


def _module_of(key: str) -> str:
    """The module that a key of an adapter's weights is of."""
    return re.split(
        r"\.(?:lora(?:_A|_B|_down|_up|_linear_layer|_magnitude_vector)?|alpha)(?:\.|$)", key
    )[0]


def _check(component: Any, full_name: str, name: str, weights: LayerWeights) -> None:
    """Raise ``AdapterMismatch`` if ``weights`` cannot be added to the layer ``name``."""
    try:
        layer = component.get_submodule(name)
    except AttributeError:
        raise AdapterMismatch(f"the model has no {full_name}") from None
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise AdapterMismatch(f"{full_name} is a {type(layer).__name__}, not a linear layer")
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or weights.magnitude is not None):
        raise AdapterMismatch(f"{full_name} is a convolution with groups or of DoRA")
    outputs, *inputs = layer.weight.shape
    found = (weights.up.shape[0], *weights.down.shape[1:])
    if found != (outputs, *inputs) or weights.up.shape[1] != weights.rank:
        raise AdapterMismatch(
            f"{full_name} has weights of {[outputs, *inputs]}, the adapter is for {list(found)}"
        )
