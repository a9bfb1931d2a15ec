"""From protobuf requests to those of the service layer."""

import hashlib
from collections.abc import Mapping
from typing import Any

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_server.core.inputs import Lora
from darkroom_server.rpc.enums import FORMAT_FROM_WIRE, SCHEDULER_FROM_WIRE, SYNTAX_FROM_WIRE
from darkroom_server.service.request import (
    INPUT_FIELDS,
    GenerationRequest,
    ImageSource,
    Inputs,
    RequestedControl,
)

NO_PREVIEWS = generation_pb2.PreviewOptions()


def generation_request(
    message: generation_pb2.GenerateRequest,
    preview: generation_pb2.PreviewOptions = NO_PREVIEWS,
) -> GenerationRequest:
    """The request of ``message``, with no field interpreted yet."""
    return GenerationRequest(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        model=message.model,
        width=message.width if message.HasField("width") else None,
        height=message.height if message.HasField("height") else None,
        steps=message.steps if message.HasField("steps") else None,
        guidance_scale=message.guidance_scale if message.HasField("guidance_scale") else None,
        seed=message.seed if message.HasField("seed") else None,
        image_count=message.image_count if message.HasField("image_count") else None,
        scheduler=_name(message.scheduler, SCHEDULER_FROM_WIRE),
        format=_name(message.format, FORMAT_FROM_WIRE),
        quality=message.quality if message.HasField("quality") else None,
        exact=message.exact,
        embed_record=message.embed_record,
        request_id=message.request_id,
        keep=message.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP,
        preview_every=preview.every_steps,
        preview_format=_name(preview.format, FORMAT_FROM_WIRE),
        true_cfg_scale=message.true_cfg_scale if message.HasField("true_cfg_scale") else None,
        max_sequence_length=(
            message.max_sequence_length if message.HasField("max_sequence_length") else None
        ),
        prompt_2=message.prompt_2,
        negative_prompt_2=message.negative_prompt_2,
        prompt_3=message.prompt_3,
        negative_prompt_3=message.negative_prompt_3,
        empty_negative_prompt=message.empty_negative_prompt,
        guidance_rescale=message.guidance_rescale if message.HasField("guidance_rescale") else None,
        prompt_syntax=_name(message.prompt_syntax, SYNTAX_FROM_WIRE),
        inputs=_inputs(message),
    )


def _inputs(message: generation_pb2.GenerateRequest) -> Inputs | None:
    """The images and adapters, None if none of their fields is set."""
    if not any(field.name in INPUT_FIELDS for field, _ in message.ListFields()):
        return None
    has = message.HasField
    return Inputs(
        image=_source(message.image) if has("image") else None,
        mask_image=_source(message.mask_image) if has("mask_image") else None,
        strength=message.strength if has("strength") else None,
        reference_images=tuple(map(_source, message.reference_images)),
        loras=tuple(
            Lora(id=lora.id, scale=lora.scale if lora.HasField("scale") else 1.0)
            for lora in message.loras
        ),
        controls=tuple(map(_control, message.controls)),
        ip_adapter_image=_source(message.ip_adapter_image) if has("ip_adapter_image") else None,
        ip_adapter_scale=message.ip_adapter_scale if has("ip_adapter_scale") else None,
    )


def _source(image: image_pb2.ImageInput) -> ImageSource:
    if image.WhichOneof("source") == "data":
        digest = "sha256:" + hashlib.sha256(image.data).hexdigest()
        return ImageSource(digest=digest, data=image.data)
    return ImageSource(digest=image.upload_id)


def _control(control: generation_pb2.Control) -> RequestedControl:
    return RequestedControl(
        id=control.id,
        image=_source(control.image) if control.HasField("image") else None,
        scale=control.scale if control.HasField("scale") else 1.0,
        start=control.start if control.HasField("start") else 0.0,
        end=control.end if control.HasField("end") else 1.0,
    )


def time_limit(message: generation_pb2.SubmitGenerationRequest) -> float | None:
    """The time limit in seconds, None without one."""
    if not message.HasField("time_limit"):
        return None
    return message.time_limit.seconds + message.time_limit.nanos / 1e9


def _name(number: int, known: Mapping[Any, str]) -> str | None:
    """The name of an enum's value; its number if unknown, None if unset."""
    if not number:
        return None
    return known.get(number, str(number))
