"""The images and adapters of a request: what can be checked before any image is decoded."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.errors import UnknownAdapter, Violation
from darkroom_server.core.job import Task
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import AdapterStatus
from darkroom_server.service.request import ImageSource, Inputs, RequestedControl

UPLOAD_ID = re.compile(r"sha256:[0-9a-f]{64}")
FIELD_OF_TASK = {
    Task.TEXT_TO_IMAGE: "image",
    Task.IMAGE_TO_IMAGE: "image",
    Task.INPAINT: "mask_image",
    Task.EDIT: "reference_images",
}
"""The field that decides each task; a request from text alone lacks it."""

MAX_LORA_SCALE = 4.0
MAX_CONTROL_SCALE = 2.0


def input_values(inputs: Inputs, model: ModelInfo) -> dict[str, Any]:
    """The fields of a job that ``inputs`` decide, without the images."""
    scale = inputs.ip_adapter_scale
    return {
        "strength": _strength_of(inputs, model),
        "loras": inputs.loras,
        "ip_adapter_scale": 1.0 if scale is None else scale,
    }


def sources_of(inputs: Inputs) -> Iterator[tuple[str, ImageSource]]:
    """Each image of ``inputs``, with the name of its field."""
    for name in ("image", "mask_image", "ip_adapter_image"):
        if (source := getattr(inputs, name)) is not None:
            yield name, source
    for index, source in enumerate(inputs.reference_images):
        yield f"reference_images[{index}]", source
    for index, control in enumerate(inputs.controls):
        if control.image is not None:
            yield f"controls[{index}].image", control.image


def check_inputs(inputs: Inputs | None, model: ModelInfo, steps: int) -> list[Violation]:
    """Everything in ``inputs`` that ``model`` does not accept, for a run of ``steps`` steps.

    A field that the model does not take at all is checked elsewhere.
    """
    inputs = inputs or Inputs()
    takes = model.optional_fields
    found = [*_task(inputs, model), *_sources(inputs, model)]
    if "mask_image" in takes and inputs.mask_image is not None and inputs.image is None:
        found.append(Violation("mask_image", "needs image"))
    if "strength" in takes:
        found += _strength(inputs, model, steps)
    if "reference_images" in takes:
        most = model.limits.max_reference_images
        found += _at_most("reference_images", len(inputs.reference_images), most)
    if "loras" in takes:
        found += _loras(inputs, model.limits.max_loras)
    if "controls" in takes:
        found += _controls(inputs.controls, model.limits.max_controls)
    scale = inputs.ip_adapter_scale
    if "ip_adapter_scale" in takes and scale is not None:
        found += _between("ip_adapter_scale", scale, 0.0, 1.0)
        if inputs.ip_adapter_image is None:
            found.append(Violation("ip_adapter_scale", "needs ip_adapter_image"))
    return found


def _task(inputs: Inputs, model: ModelInfo) -> Iterator[Violation]:
    task = inputs.task
    field = FIELD_OF_TASK[task]
    if task is Task.TEXT_TO_IMAGE and field not in model.optional_fields:
        field = "reference_images"
    if task in model.tasks or (
        task is not Task.TEXT_TO_IMAGE and field not in model.optional_fields
    ):
        return  # A field that the model does not take is a violation already.
    offers = ", ".join(model.tasks)
    yield Violation(field, f"model {model.id!r} offers {offers}, not {task}")


def _sources(inputs: Inputs, model: ModelInfo) -> Iterator[Violation]:
    for name, source in sources_of(inputs):
        if re.split(r"[\[.]", name)[0] not in model.optional_fields:
            continue
        if source.data is None and not source.digest:
            yield Violation(name, "must have data or an upload_id")
        elif source.data is None and not UPLOAD_ID.fullmatch(source.digest):
            yield Violation(f"{name}.upload_id", "must be what UploadImage returned: sha256:…")
        elif source.data is not None and not source.data:
            yield Violation(f"{name}.data", "must be the bytes of a picture, and is empty")


def _strength(inputs: Inputs, model: ModelInfo, steps: int) -> Iterator[Violation]:
    asked, strength = inputs.strength, _strength_of(inputs, model)
    if asked is not None and inputs.image is None:
        yield Violation("strength", "needs image")
    if asked is not None and not (math.isfinite(asked) and 0.0 < asked <= 1.0):
        yield Violation("strength", f"must be above 0, to 1, not {asked:g}")
    elif (
        inputs.image is not None
        and steps > 0
        and model.strength_rounding.steps_taken(steps, strength) < 1
    ):
        yield Violation(
            "strength", f"of {steps} steps, {strength:g} is less than one; use more of either"
        )


def _strength_of(inputs: Inputs, model: ModelInfo) -> float:
    """How much of the image is replaced; 1 without one."""
    if inputs.image is None:
        return 1.0
    if inputs.strength is not None:
        return inputs.strength
    return model.defaults.strength_of(inputs.task)


def check_adapters(
    inputs: Inputs, model: ModelInfo, known: Sequence[AdapterStatus]
) -> list[Violation]:
    """Why the LoRAs and ControlNets of ``inputs`` cannot be added to ``model``.

    ``known`` are those of all models. Raises ``UnknownAdapter`` for one that is not among them.
    """
    asked = [
        (f"loras[{index}].id", AdapterKind.LORA, lora.id) for index, lora in enumerate(inputs.loras)
    ]
    asked += [
        (f"controls[{index}].id", AdapterKind.CONTROLNET, control.id)
        for index, control in enumerate(inputs.controls)
    ]
    offers = {(offer.kind, offer.id): offer for offer in model.adapters}
    found = []
    for field, kind, id in asked:
        names = [adapter.id for adapter in known if adapter.kind is kind]
        if id not in names:
            raise UnknownAdapter(id[:256], names)
        offer = offers.get((kind, id))
        reason = f"does not fit model {model.id!r}" if offer is None else offer.rejection
        if reason:
            found.append(Violation(field, f"{id!r}: {reason}"))
    return found


def _loras(inputs: Inputs, most: int) -> Iterator[Violation]:
    yield from _at_most("loras", len(inputs.loras), most)
    for index, lora in enumerate(inputs.loras):
        yield from _between(f"loras[{index}].scale", lora.scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    yield from _ids("loras", [lora.id for lora in inputs.loras], distinct=True)


def _controls(controls: tuple[RequestedControl, ...], most: int) -> Iterator[Violation]:
    yield from _at_most("controls", len(controls), most)
    for index, control in enumerate(controls):
        name = f"controls[{index}]"
        if control.image is None:
            yield Violation(f"{name}.image", "must be set")
        yield from _between(f"{name}.scale", control.scale, 0.0, MAX_CONTROL_SCALE)
        yield from _between(f"{name}.start", control.start, 0.0, 1.0)
        if not control.start < control.end <= 1.0:
            says = f"must be above start ({control.start:g}), to 1, not {control.end:g}"
            yield Violation(f"{name}.end", says)
    yield from _ids("controls", [control.id for control in controls], distinct=False)


def _ids(name: str, ids: Iterable[str], *, distinct: bool) -> Iterator[Violation]:
    seen: set[str] = set()
    for index, id in enumerate(ids):
        if not id:
            yield Violation(f"{name}[{index}].id", "must not be empty")
        elif distinct and id in seen:
            yield Violation(f"{name}[{index}].id", f"{id!r} is there twice")
        seen.add(id)


def _at_most(name: str, count: int, most: int) -> Iterator[Violation]:
    if count > most:
        yield Violation(name, f"must be at most {most}, and there are {count}")


def _between(name: str, value: float, low: float, high: float) -> Iterator[Violation]:
    if not (math.isfinite(value) and low <= value <= high):
        yield Violation(name, f"must be {low:g} to {high:g}, not {value:g}")
