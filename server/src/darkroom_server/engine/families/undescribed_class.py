"""Which pipelines of diffusers can be served without a family of their own, by their class."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers.utils import BaseOutput

from darkroom_server.core.errors import StartupError
from darkroom_server.engine.components.classes import component_class
from darkroom_server.engine.components.scheduler_table import MAX_STEPS
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.undescribed import (
    Undescribed,
    call_parameters,
    default_number,
)
from darkroom_server.engine.loading.defaults import Defaults

DENOISERS = ("unet", "transformer", "prior")
"""The names that diffusers gives to the component that runs every step."""

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Components without which diffusers generates images from text, if the pipeline lets them out."""


def undescribed_family(kind: str, index: Mapping[str, Any], name: str) -> type[Family]:
    """A family for the class ``kind`` of diffusers, with the components of ``index``.

    ``name`` is what the operator calls the model. Raises ``StartupError`` if the class is unknown,
    if it does not turn text into images, or if Darkroom does not load one of its components.
    """
    found = _pipeline_class(kind)
    if found is None:
        raise StartupError(
            f"model {name!r} is a {kind}, which diffusers {diffusers.__version__} does not know, "
            "or which needs a package that is not installed"
        )
    parameters = call_parameters(found)
    if why := _unfit(found, parameters):
        raise StartupError(
            f"model {name!r} is a {kind}, which {why}; Darkroom generates images from text"
        )
    classes = _component_classes(index, found._optional_components, name)
    left_out = [part for part in LEFT_OUT if part in found._optional_components]
    modules = {
        part: each
        for part, each in classes.items()
        if issubclass(each, torch.nn.Module) and part not in left_out
    }
    denoisers = _denoisers(modules)
    if not denoisers or "scheduler" not in classes:
        missing = "scheduler" if denoisers else "denoiser"
        raise StartupError(
            f"model {name!r} is a {kind} without a {missing}, which is not supported"
        )
    members = {
        "__doc__": f"The family of ``{kind}``, which nobody has described.",
        "pipeline_class": kind,
        "components": tuple(modules),
        "optional": tuple(left_out),
        "defaults": Defaults(
            steps=min(MAX_STEPS, max(1, default_number(parameters, "num_inference_steps", 30))),
            guidance_scale=float(default_number(parameters, "guidance_scale", 0.0)),
        ),
        "denoiser_name": denoisers[0],
        "denoisers": denoisers,
        "vae_name": next((p for p, each in modules.items() if hasattr(each, "decode")), None),
        "own_components": tuple(
            part
            for part, each in classes.items()
            if issubclass(each, diffusers.SchedulerMixin) and part != "scheduler"
        ),
    }
    return cast("type[Family]", type(kind, (Undescribed,), members))


def _pipeline_class(kind: str) -> Any:
    found = getattr(diffusers, kind, None)
    is_pipeline = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if is_pipeline else None


def _unfit(pipeline_class: type, parameters: Mapping[str, inspect.Parameter]) -> str:
    """Why a pipeline of this class cannot be served, "" if it may be."""
    if "prompt" not in parameters:
        return "takes no prompt"
    if "generator" not in parameters:
        return "takes no generator, so that no seed repeats its images"
    outputs = _outputs(pipeline_class)
    fields = {field for output in outputs for field in output.__dataclass_fields__}
    if not fields:
        return "does not say what it returns"
    if not fields & {"images", "image"}:
        return f"returns {', '.join(sorted(fields))}"
    return ""


def _outputs(pipeline_class: Any) -> list[Any]:
    """The kinds of output that the pipeline's call makes: the classes that its code names."""
    call = inspect.unwrap(pipeline_class.__call__)
    if isinstance(call, functools.partial):
        return []
    named = [call.__globals__.get(name) for name in call.__code__.co_names]
    return [each for each in named if isinstance(each, type) and issubclass(each, BaseOutput)]


def _component_classes(
    index: Mapping[str, Any], optional: Sequence[str], name: str
) -> dict[str, type]:
    """The classes of the components in ``index``, without the ``optional`` ones that are not there.

    Raises ``StartupError``.
    """
    classes = {}
    for part, entry in index.items():
        is_component = isinstance(entry, list | tuple) and len(entry) == 2
        if part.startswith("_") or not is_component:
            continue
        if entry[0] is None:
            if part in optional:
                continue
            raise StartupError(f"model {name!r} has no {part}; copy or download it again")
        found = component_class(entry)
        if found is None:
            raise StartupError(
                f"model {name!r}: its {part} is a {entry[0]}.{entry[1]}, which is not supported"
            )
        classes[part] = found
    return classes


def _denoisers(modules: Mapping[str, type]) -> tuple[str, ...]:
    """The components that run the steps; if no name says so, all but text encoders and VAEs."""
    named = [part for part in DENOISERS if part in modules]
    if named:
        return tuple(named)
    from_transformers = transformers.PreTrainedModel
    return tuple(
        part
        for part, each in modules.items()
        if not issubclass(each, from_transformers) and not hasattr(each, "decode")
    )
