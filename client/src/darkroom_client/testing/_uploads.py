"""Uploads of the fake server, and the images and adapters of a request."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_client._errors import UploadNotFound, Violation
from darkroom_client._types.model import Model, ModelLimits, Task

SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
"""What PNG, JPEG and WebP files begin with."""

UPLOAD_ID = re.compile(r"sha256:[0-9a-f]{64}")
NOT_A_PICTURE = "is not a PNG, JPEG or WebP picture"


class Uploads:
    """Files by upload id, of all callers together. It does not decode them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls = 0

    def add(self, data: bytes) -> str:
        """Store a file; its upload id."""
        self.calls += 1
        upload_id = digest_of(data)
        self.files[upload_id] = data
        return upload_id

    def check(self, request: generation_pb2.GenerateRequest) -> None:
        """Raise ``UploadNotFound`` if ``request`` names files that are not there."""
        named = [image.upload_id for _, image in images_of(request) if image.upload_id]
        missing = [upload_id for upload_id in named if upload_id not in self.files]
        if missing:
            text = ",".join(dict.fromkeys(missing))
            raise UploadNotFound(
                f"this caller has no upload {text} here, or it was removed; upload it again",
                metadata={"upload_ids": text},
            )


def digest_of(data: bytes) -> str:
    """The upload id of a file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def images_of(
    request: generation_pb2.GenerateRequest,
) -> Iterator[tuple[str, image_pb2.ImageInput]]:
    """Each image of ``request``, with the name of its field."""
    for name in ("image", "mask_image", "ip_adapter_image"):
        if request.HasField(name):
            yield name, getattr(request, name)
    for index, image in enumerate(request.reference_images):
        yield f"reference_images[{index}]", image
    for index, control in enumerate(request.controls):
        if control.HasField("image"):
            yield f"controls[{index}].image", control.image


def name_by_digest(request: generation_pb2.GenerateRequest) -> None:
    """Replace the images of ``request`` by their upload ids, as in a record."""
    for _, image in images_of(request):
        if image.data:
            image.upload_id = digest_of(image.data)


def check_inputs(
    request: generation_pb2.GenerateRequest,
    model: Model,
    limits: ModelLimits,
    filled: generation_pb2.GenerateRequest,
) -> Iterator[Violation]:
    """What is wrong with the images and adapters of ``request``, as far as the model takes them.

    ``filled`` is the request with the model's defaults.
    """
    takes = model.optional_fields
    yield from _task(request, model)
    for name, image in images_of(request):
        if re.split(r"[\[.]", name)[0] in takes:
            yield from _image(name, image)
    if "mask_image" in takes and request.HasField("mask_image") and not request.HasField("image"):
        yield Violation(field="mask_image", description="needs image")
    if "strength" in takes:
        yield from _strength(request, filled)
    for name in ("reference_images", "loras", "controls"):
        count, most = len(getattr(request, name)), getattr(limits, f"max_{name}")
        if name in takes and count > most:
            description = f"must be at most {most}, and there are {count}"
            yield Violation(field=name, description=description)
    if "loras" in takes:
        yield from _loras(request)
    if "controls" in takes:
        for index, control in enumerate(request.controls):
            yield from _control(f"controls[{index}]", control)
    if "ip_adapter_scale" in takes and request.HasField("ip_adapter_scale"):
        yield from _between("ip_adapter_scale", request.ip_adapter_scale, 0.0, 1.0)
        if not request.HasField("ip_adapter_image"):
            yield Violation(field="ip_adapter_scale", description="needs ip_adapter_image")


def _task(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    field, task = "image", Task.TEXT_TO_IMAGE
    if request.HasField("mask_image"):
        field, task = "mask_image", Task.INPAINT
    elif request.HasField("image"):
        task = Task.IMAGE_TO_IMAGE
    elif request.reference_images:
        field, task = "reference_images", Task.EDIT
    elif "image" not in model.optional_fields:
        field = "reference_images"
    taken = task is Task.TEXT_TO_IMAGE or field in model.optional_fields
    if model.tasks and task not in model.tasks and taken:
        description = f"model {model.id!r} offers {', '.join(model.tasks)}, not {task}"
        yield Violation(field=field, description=description)


def _image(name: str, image: image_pb2.ImageInput) -> Iterator[Violation]:
    if image.WhichOneof("source") == "data":
        if not image.data:
            description = "must be the bytes of a picture, and is empty"
            yield Violation(field=f"{name}.data", description=description)
        elif not SIGNATURES.match(image.data):
            yield Violation(field=name, description=NOT_A_PICTURE)
    elif not image.upload_id:
        yield Violation(field=name, description="must have data or an upload_id")
    elif not UPLOAD_ID.fullmatch(image.upload_id):
        description = "must be what UploadImage returned: sha256:…"
        yield Violation(field=f"{name}.upload_id", description=description)


def _strength(
    request: generation_pb2.GenerateRequest, filled: generation_pb2.GenerateRequest
) -> Iterator[Violation]:
    asked, strength, steps = request.HasField("strength"), filled.strength, filled.steps
    has_image = request.HasField("image")
    if asked and not has_image:
        yield Violation(field="strength", description="needs image")
    if asked and not (math.isfinite(strength) and 0.0 < strength <= 1.0):
        description = f"must be above 0, to 1, not {strength:g}"
        yield Violation(field="strength", description=description)
    elif has_image and steps > 0 and int(steps * strength) < 1:
        description = f"of {steps} steps, {strength:g} is less than one; use more of either"
        yield Violation(field="strength", description=description)


def _loras(request: generation_pb2.GenerateRequest) -> Iterator[Violation]:
    seen: set[str] = set()
    for index, lora in enumerate(request.loras):
        if lora.HasField("scale"):
            yield from _between(f"loras[{index}].scale", lora.scale, -4.0, 4.0)
        if not lora.id:
            yield Violation(field=f"loras[{index}].id", description="must not be empty")
        elif lora.id in seen:
            yield Violation(field=f"loras[{index}].id", description=f"{lora.id!r} is there twice")
        seen.add(lora.id)


def _control(name: str, control: Any) -> Iterator[Violation]:
    if not control.HasField("image"):
        yield Violation(field=f"{name}.image", description="must be set")
    if not control.id:
        yield Violation(field=f"{name}.id", description="must not be empty")
    yield from _between(f"{name}.scale", control.scale, 0.0, 2.0)
    yield from _between(f"{name}.start", control.start, 0.0, 1.0)
    end = control.end if control.HasField("end") else 1.0
    if not control.start < end <= 1.0:
        description = f"must be above start ({control.start:g}), to 1, not {end:g}"
        yield Violation(field=f"{name}.end", description=description)


def _between(name: str, value: float, low: float, high: float) -> Iterator[Violation]:
    if not (math.isfinite(value) and low <= value <= high):
        description = f"must be {low:g} to {high:g}, not {value:g}"
        yield Violation(field=name, description=description)
