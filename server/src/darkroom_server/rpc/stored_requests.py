"""Stored requests as protobuf: fields that a version does not know are left unread, not misread."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from darkroom.ledger.v1 import entry_pb2
from darkroom.v1 import generation_pb2, image_pb2
from darkroom_server.rpc.enums import FORMAT_TO_WIRE, SCHEDULER_TO_WIRE, SYNTAX_TO_WIRE
from darkroom_server.rpc.requests import generation_request
from darkroom_server.service.request import (
    GenerationRequest,
    ImageSource,
    Inputs,
    RequestedControl,
)
from darkroom_server.service.stored_request import StoredRequest

SCHEMA = 1


class StoredRequests:
    """The ``RequestCodec`` of ``darkroom.ledger.v1.StoredRequest``."""

    def encode(self, stored: StoredRequest) -> bytes:
        """``stored`` as a message."""
        request = stored.request
        return entry_pb2.StoredRequest(
            schema=SCHEMA,
            request=request_message(request),
            preview=generation_pb2.PreviewOptions(
                every_steps=request.preview_every,
                format=_number(request.preview_format, FORMAT_TO_WIRE),
            ),
            seed=stored.seed,
            model=stored.model,
            model_revision=stored.model_revision,
            address=stored.address,
            priority=stored.priority,
            trace_id=stored.trace_id,
        ).SerializeToString()

    def decode(self, data: bytes) -> StoredRequest:
        """The request of a message; raises ``ValueError`` if it cannot be read."""
        try:
            message = entry_pb2.StoredRequest.FromString(data)
        except DecodeError as error:
            raise ValueError(f"not a stored request: {error}") from None
        if message.schema != SCHEMA:
            raise ValueError(f"a stored request of schema {message.schema}, not {SCHEMA}")
        return StoredRequest(
            request=generation_request(message.request, message.preview),
            seed=message.seed,
            model=message.model,
            model_revision=message.model_revision,
            address=message.address,
            priority=message.priority,
            trace_id=message.trace_id,
        )


def request_message(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """``request`` as the message that ``generation_request`` reads; pictures by their digests."""
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
        scheduler=_number(request.scheduler, SCHEDULER_TO_WIRE),
        format=_number(request.format, FORMAT_TO_WIRE),
        quality=request.quality,
        request_id=request.request_id,
        exact=request.exact,
        on_disconnect=(
            generation_pb2.ON_DISCONNECT_KEEP
            if request.keep
            else generation_pb2.ON_DISCONNECT_CANCEL
        ),
        embed_record=request.embed_record,
        true_cfg_scale=request.true_cfg_scale,
        max_sequence_length=request.max_sequence_length,
        prompt_2=request.prompt_2,
        negative_prompt_2=request.negative_prompt_2,
        prompt_3=request.prompt_3,
        negative_prompt_3=request.negative_prompt_3,
        empty_negative_prompt=request.empty_negative_prompt,
        guidance_rescale=request.guidance_rescale,
        prompt_syntax=_number(request.prompt_syntax, SYNTAX_TO_WIRE),
        **({} if request.inputs is None else _input_fields(request.inputs)),
    )


def _input_fields(inputs: Inputs) -> dict[str, Any]:
    return {
        "image": _image(inputs.image),
        "mask_image": _image(inputs.mask_image),
        "strength": inputs.strength,
        "reference_images": [_image(each) for each in inputs.reference_images],
        "loras": [generation_pb2.Lora(id=each.id, scale=each.scale) for each in inputs.loras],
        "controls": [_control(each) for each in inputs.controls],
        "ip_adapter_image": _image(inputs.ip_adapter_image),
        "ip_adapter_scale": inputs.ip_adapter_scale,
    }


def _image(source: ImageSource | None) -> image_pb2.ImageInput | None:
    return None if source is None else image_pb2.ImageInput(upload_id=source.digest)


def _control(control: RequestedControl) -> generation_pb2.Control:
    return generation_pb2.Control(
        id=control.id,
        image=_image(control.image),
        scale=control.scale,
        start=control.start,
        end=control.end,
    )


def _number(name: str | None, known: Mapping[Any, Any]) -> Any:
    """The number of an enum's value by its name; None for none."""
    return None if name is None else known[name]
