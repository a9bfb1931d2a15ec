"""Decode results and images."""

import json

from darkroom.v1 import generation_pb2
from darkroom_client._errors import ServerError
from darkroom_client._types.image import Image
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.result import GenerationResult, Timings
from darkroom_client._wire.requests import decode_request
from darkroom_client._wire.values import decode_format, decode_seconds


def decode_response(response: generation_pb2.GenerateResponse) -> GenerationResult:
    """Decode a result; raises ``ServerError`` if it is unreadable."""
    return GenerationResult(
        request_id=response.request_id,
        images=tuple(
            decode_image(image, response.request_id, image.data) for image in response.images
        ),
        timings=decode_timings(response.timings),
        model=response.model,
        model_revision=response.model_revision,
    )


def decode_timings(timings: generation_pb2.Timings) -> Timings:
    """Decode the timings."""
    return Timings(
        queue=decode_seconds(timings.queue),
        encode_prompt=decode_seconds(timings.encode_prompt),
        denoise=decode_seconds(timings.denoise),
        decode=decode_seconds(timings.decode),
        encode_image=decode_seconds(timings.encode_image),
        total=decode_seconds(timings.total),
    )


def decode_image(image: generation_pb2.Image, request_id: str, data: bytes) -> Image:
    """Decode an image with ``data``; raises ``ServerError`` if it is unreadable."""
    image_format = decode_format(image.format)
    if image_format is None:
        raise unreadable(f"an image in the unknown format {image.format}", request_id)
    return Image(
        data=data,
        format=image_format,
        width=image.width,
        height=image.height,
        seed=image.seed,
        prompt_truncated=image.prompt_truncated,
        flagged=image.flagged,
        replay=decode_replay(image.replay, request_id),
    )


def decode_replay(record: generation_pb2.ReplayRecord, request_id: str) -> ReplayRecord:
    """Decode a replay record; raises ``ServerError`` if it is unreadable."""
    try:
        config = json.loads(record.scheduler_config_json or "{}")
    except ValueError as error:
        raise unreadable("a scheduler configuration that is not JSON", request_id) from error
    return ReplayRecord(
        request=decode_request(record.request),
        model_revision=record.model_revision,
        scheduler_class=record.scheduler_class,
        scheduler_config=config,
        dtype=record.dtype,
        device=record.device,
        preset=record.preset,
        library_versions=dict(sorted(record.library_versions.items())),
        rows_in_last_pass=record.rows_in_last_pass,
        pixels_sha256=record.pixels_sha256,
        channels_last=record.channels_last,
        memory_fallbacks=tuple(record.memory_fallbacks),
        quantization=record.quantization,
        offload=record.offload,
        vae_channels_last=record.vae_channels_last
        if record.HasField("vae_channels_last") and record.vae_channels_last != record.channels_last
        else None,
    )


def unreadable(what: str, request_id: str) -> ServerError:
    """The error for a reply that holds ``what``."""
    return ServerError(
        f"the reply holds {what}: client and server may be of different versions",
        code="OK",
        reason="UNREADABLE_REPLY",
        request_id=request_id,
    )
