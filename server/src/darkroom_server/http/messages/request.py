"""From a JSON body to a request of the service layer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import ImageFormat, PromptSyntax, SchedulerName, Task
from darkroom_server.core.model import ModelInfo
from darkroom_server.http.call import KEY_HEADER
from darkroom_server.http.messages.fields import FIELDS, Field, checked_values
from darkroom_server.http.messages.multipart import Form
from darkroom_server.service.request import GenerationRequest, Inputs
from darkroom_server.service.validation import as_float32

SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

STEPS_OF_QUALITY = {"low": 0.5, "high": 1.5, "hd": 1.5}
"""Multiples of the model's default; the other qualities take the default."""

NO_IMAGES = Inputs()

NAMES = {
    "mask_image": "mask",
    "image_count": "n",
    "format": "output_format",
    "quality": "output_compression",
    "request_id": KEY_HEADER,
    "preview": "partial_images",
    "preview.every_steps": "partial_images",
    "preview.format": "partial_images",
}
"""Fields of ``GenerationRequest`` that have another name over HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """A request for images over HTTP: ``generation``, and how it is answered.

    ``partial_images`` are previews of each image. ``progress``: send our own events too.
    ``quality`` is that of OpenAI. ``events``: what the names of the
    events of a stream begin with. ``sized``: the caller set `size`.
    ``violations`` are those that are known so far.
    """

    generation: GenerationRequest
    as_urls: bool
    stream: bool
    partial_images: int
    progress: bool
    quality: str
    events: str
    sized: bool
    violations: tuple[Violation, ...]


def image_request(
    body: Mapping[str, Any],
    key: str,
    model: ModelInfo | None,
    fields: Mapping[str, Field] = FIELDS,
    images: Inputs = NO_IMAGES,
    events: str = "image_generation",
    *,
    urls_by_default: bool = False,
) -> ImageRequest:
    """The request in ``body``; ``key`` names its job. ``model`` is None if it is not known.

    ``images`` are the pictures that came with it, ``events`` as in ``ImageRequest``.
    ``urls_by_default``: it gets URLs if it has no `response_format`, unless it is a stream.
    """
    values, wrong = checked_values(body, fields)
    width, height = _size(values, wrong)
    steps = _steps(values, model, wrong)
    stream, partial = values.get("stream", False), values.get("partial_images", 0)
    usual_format = "url" if urls_by_default and not stream else "b64_json"
    for name in ("partial_images", "progress"):
        if values.get(name) and not stream:
            wrong.append(Violation(name, "needs stream: true"))
    # As gRPC's door makes them: the same request is the same job over both.
    format = ImageFormat(values["output_format"]) if "output_format" in values else None
    scheduler = SchedulerName(values["scheduler"]) if "scheduler" in values else None
    syntax = PromptSyntax(values["prompt_syntax"]) if "prompt_syntax" in values else None
    generation = GenerationRequest(
        prompt=values.get("prompt", ""),
        negative_prompt=values.get("negative_prompt", ""),
        model=values.get("model", ""),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=_real(values, "guidance_scale"),
        seed=values.get("seed"),
        image_count=values.get("n"),
        scheduler=scheduler,
        format=format,
        quality=_compression(values),
        exact=values.get("exact", False),
        embed_record=values.get("embed_record", False),
        request_id=key,
        keep=values.get("keep", False),
        preview_every=_preview_every(partial, steps, scheduler, model),
        preview_format=ImageFormat.WEBP if format is ImageFormat.WEBP else ImageFormat.JPEG,
        true_cfg_scale=_real(values, "true_cfg_scale"),
        max_sequence_length=values.get("max_sequence_length"),
        prompt_2=values.get("prompt_2", ""),
        negative_prompt_2=values.get("negative_prompt_2", ""),
        prompt_3=values.get("prompt_3", ""),
        negative_prompt_3=values.get("negative_prompt_3", ""),
        empty_negative_prompt=values.get("empty_negative_prompt", False),
        guidance_rescale=_real(values, "guidance_rescale"),
        prompt_syntax=syntax,
        inputs=_inputs(values, images),
    )
    return ImageRequest(
        generation=generation,
        as_urls=values.get("response_format", usual_format) == "url",
        stream=stream,
        partial_images=partial,
        progress=values.get("progress", False),
        quality=values.get("quality", "auto"),
        events=events,
        sized="size" in values,
        violations=tuple(wrong),
    )


def renamed(error: InvalidRequest, *, sized: bool) -> InvalidRequest:
    """``error`` with the names of the fields over HTTP; ``sized``: the request has `size`."""
    names = {**NAMES, "width": "size", "height": "size"} if sized else NAMES
    violations = [
        Violation(names.get(each.field, _plain(each.field)), each.description)
        for each in error.violations
    ]
    # Width and height may have the same error.
    return InvalidRequest(list(dict.fromkeys(violations)), error.reason)


def _plain(field: str) -> str:
    """The name over HTTP of a field that is not in ``NAMES``; all pictures are `image`."""
    return "image" if field.startswith(("reference_images", "image.")) else field


def edit_images(form: Form, model: ModelInfo | None) -> Inputs:
    """The pictures of an edit: with a mask, what is generated again; else what it starts from.

    A model that edits takes them as references, unless the form has a strength.
    """
    edits = model is not None and Task.EDIT in model.tasks and "strength" not in form.values
    if form.mask is None and edits:
        return Inputs(reference_images=form.images)
    return Inputs(
        image=form.images[0] if form.images else None,
        mask_image=form.mask,
        reference_images=form.images[1:],
    )


def _inputs(values: Mapping[str, Any], images: Inputs) -> Inputs | None:
    loras = tuple(
        Lora(id=each["id"], scale=as_float32(float(each.get("scale", 1.0))))
        for each in values.get("loras", ())
    )
    inputs = replace(images, loras=loras, strength=_real(values, "strength"))
    return None if inputs == NO_IMAGES else inputs


def _size(values: Mapping[str, Any], wrong: list[Violation]) -> tuple[int | None, int | None]:
    size = values.get("size", "auto")
    width, height = values.get("width"), values.get("height")
    if size == "auto":
        return width, height
    if width is not None or height is not None:
        wrong.append(Violation("size", "must not be set with width or height"))
    found = SIZE.fullmatch(size)
    if found is None:
        wrong.append(Violation("size", 'must be "auto", or such as "512x512"'))
        return None, None
    return int(found[1]), int(found[2])


def _steps(
    values: Mapping[str, Any], model: ModelInfo | None, wrong: list[Violation]
) -> int | None:
    steps: int | None = values.get("steps")
    factor = STEPS_OF_QUALITY.get(values.get("quality", ""))
    if factor is None:
        return steps
    if steps is not None:
        wrong.append(Violation("quality", "chooses the steps, and must not be set with steps"))
        return steps
    if model is None:
        return None
    wanted = math.ceil(model.defaults.steps * factor)
    name = values.get("scheduler") or model.defaults.scheduler
    offers = [offer for offer in model.schedulers if offer.name == name] or model.schedulers
    return min(max(wanted, offers[0].min_steps), offers[0].max_steps)


def _preview_every(
    partial_images: int, steps: int | None, scheduler: str | None, model: ModelInfo | None
) -> int:
    """A preview every N denoiser calls, often enough to choose ``partial_images`` of them."""
    if not partial_images:
        return 0
    if model is None:
        return 1
    name = scheduler or model.defaults.scheduler
    offer = next((offer for offer in model.schedulers if offer.name == name), model.schedulers[0])
    calls = offer.denoiser_calls(steps or model.defaults.steps)
    return max(1, calls // (partial_images + 1))


def _compression(values: Mapping[str, Any]) -> int | None:
    compression: int | None = values.get("output_compression")
    # OpenAI's scale begins at 0, that of the formats at 1.
    return None if compression is None else max(1, compression)


def _real(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    # As gRPC sends it.
    return None if value is None else as_float32(float(value))
