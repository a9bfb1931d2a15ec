"""Encode and decode requests."""

import operator
from collections.abc import Iterator
from enum import StrEnum

from darkroom.v1 import generation_pb2
from darkroom_client._checks import (
    check_flags,
    check_integer,
    check_number,
    check_text,
    is_unicode,
)
from darkroom_client._errors import InvalidRequest, Violation
from darkroom_client._types.enums import ImageFormat, PromptSyntax, Scheduler
from darkroom_client._types.request import GenerationRequest
from darkroom_client._wire.inputs import decode_inputs, encode_inputs
from darkroom_client._wire.values import (
    decode_float,
    decode_format,
    decode_scheduler,
    decode_syntax,
    encode_format,
    encode_scheduler,
    encode_syntax,
)

_SEED_BOUND = 2**63
_INT32_BOUND = 2**31
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

_TEXTS = (
    "prompt",
    "negative_prompt",
    "model",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)
_INTEGERS = ("width", "height", "steps", "image_count", "quality", "max_sequence_length")
_SCALES = ("guidance_scale", "true_cfg_scale", "guidance_rescale")
_INPUTS = (
    "image",
    "mask_image",
    "strength",
    "reference_images",
    "loras",
    "controls",
    "ip_adapter_image",
    "ip_adapter_scale",
)
_NAMES = (("scheduler", Scheduler), ("format", ImageFormat), ("prompt_syntax", PromptSyntax))


def encode_request(
    request: GenerationRequest, *, keep: bool = False
) -> generation_pb2.GenerateRequest:
    """Encode ``request``; ``keep``: its job survives a lost connection for the grace time.

    Raises ``InvalidRequest`` for values that the message cannot hold (an unknown name, a number
    out of its type's range) and ``TypeError`` for values of the wrong type. The server checks all
    other bounds. Raises ``OSError`` for the file of an image that cannot be read.
    """
    _check_types(request)
    if violations := tuple(_violations(request)):
        raise InvalidRequest(
            "; ".join(f"{v.field}: {v.description}" for v in violations),
            code="INVALID_ARGUMENT",
            reason="INVALID_REQUEST",
            request_id=request.request_id,
            violations=violations,
        )
    brings = any(getattr(request, field) not in (None, (), []) for field in _INPUTS)
    return generation_pb2.GenerateRequest(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        image_count=request.image_count,
        scheduler=encode_scheduler(request.scheduler),
        format=encode_format(request.format),
        quality=request.quality,
        request_id=request.request_id or "",
        exact=request.exact,
        embed_record=request.embed_record,
        on_disconnect=(
            generation_pb2.ON_DISCONNECT_KEEP if keep else generation_pb2.ON_DISCONNECT_CANCEL
        ),
        true_cfg_scale=request.true_cfg_scale,
        max_sequence_length=request.max_sequence_length,
        prompt_2=request.prompt_2,
        negative_prompt_2=request.negative_prompt_2,
        prompt_3=request.prompt_3,
        negative_prompt_3=request.negative_prompt_3,
        empty_negative_prompt=request.empty_negative_prompt,
        guidance_rescale=request.guidance_rescale,
        prompt_syntax=encode_syntax(request.prompt_syntax),
        **(encode_inputs(request) if brings else {}),
    )


def encode_preview(
    every_steps: int, image_format: ImageFormat | str
) -> generation_pb2.PreviewOptions | None:
    """Encode the preview options, None for no previews; raises ``ValueError`` if invalid."""
    check_integer("preview_every", every_steps)
    if not 0 <= every_steps < _INT32_BOUND:
        raise ValueError(f"preview_every is {every_steps}, must be 0 (none) to 2^31 - 1")
    check_text("preview_format", image_format)
    if not _is_member(ImageFormat, image_format):
        names = ", ".join(ImageFormat)
        raise ValueError(f"preview_format is {image_format!r}, must be one of {names}")
    if not every_steps:
        return None
    return generation_pb2.PreviewOptions(
        every_steps=every_steps, format=encode_format(image_format)
    )


def decode_request(request: generation_pb2.GenerateRequest) -> GenerationRequest:
    """Decode a request; unset fields are None."""
    brings = any(field.name in _INPUTS for field, _ in request.ListFields())
    return GenerationRequest(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width if request.HasField("width") else None,
        height=request.height if request.HasField("height") else None,
        steps=request.steps if request.HasField("steps") else None,
        guidance_scale=(
            decode_float(request.guidance_scale) if request.HasField("guidance_scale") else None
        ),
        seed=request.seed if request.HasField("seed") else None,
        image_count=request.image_count if request.HasField("image_count") else None,
        scheduler=decode_scheduler(request.scheduler),
        format=decode_format(request.format),
        quality=request.quality if request.HasField("quality") else None,
        exact=request.exact,
        embed_record=request.embed_record,
        request_id=request.request_id or None,
        true_cfg_scale=(
            decode_float(request.true_cfg_scale) if request.HasField("true_cfg_scale") else None
        ),
        max_sequence_length=(
            request.max_sequence_length if request.HasField("max_sequence_length") else None
        ),
        prompt_2=request.prompt_2,
        negative_prompt_2=request.negative_prompt_2,
        prompt_3=request.prompt_3,
        negative_prompt_3=request.negative_prompt_3,
        empty_negative_prompt=request.empty_negative_prompt,
        guidance_rescale=(
            decode_float(request.guidance_rescale) if request.HasField("guidance_rescale") else None
        ),
        prompt_syntax=decode_syntax(request.prompt_syntax),
        **(decode_inputs(request) if brings else {}),
    )


def _check_types(request: GenerationRequest) -> None:
    for field in _TEXTS:
        if (value := getattr(request, field)) != "":
            check_text(field, value)
    if request.request_id is not None:
        check_text("request_id", request.request_id)
    for field in (*_INTEGERS, "seed"):
        if (value := getattr(request, field)) is not None:
            check_integer(field, value)
    for field in _SCALES:
        if (value := getattr(request, field)) is not None:
            check_number(field, value)
    check_flags(
        exact=request.exact,
        embed_record=request.embed_record,
        empty_negative_prompt=request.empty_negative_prompt,
    )


def _violations(request: GenerationRequest) -> Iterator[Violation]:
    for field, kind in _NAMES:
        value = getattr(request, field)
        if value is not None and not _is_member(kind, value):
            names = ", ".join(kind)
            yield Violation(field=field, description=f"is {value!r}, must be one of {names}")
    for field in _INTEGERS:
        value = getattr(request, field)
        if value is not None and not -_INT32_BOUND <= operator.index(value) < _INT32_BOUND:
            yield Violation(field=field, description=f"is {value}, out of range for 32 bits")
    for field in _SCALES:
        value = getattr(request, field)
        if value is not None and not abs(value) <= _FLOAT32_MAX:
            yield Violation(field=field, description=f"is {value}, not a finite 32-bit number")
    for field in (*_TEXTS, "request_id"):
        if (text := getattr(request, field)) and not is_unicode(text):
            yield Violation(field=field, description="is not valid Unicode text")
    if request.seed is not None and not 0 <= operator.index(request.seed) < _SEED_BOUND:
        yield Violation(field="seed", description=f"is {request.seed}, must be 0 to 2^63 - 1")


def _is_member(kind: type[StrEnum], value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True
