"""From finished jobs to messages."""

from typing import Any

from google.protobuf.duration_pb2 import Duration

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.finished_image import FinishedImage
from darkroom_server.core.inputs import Control, InputImage, Lora
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import Finished
from darkroom_server.rpc.enums import FORMAT_TO_WIRE, SCHEDULER_TO_WIRE, SYNTAX_TO_WIRE


def response_of(
    request_id: str, job: Job, model: ModelInfo, finished: Finished, total: float
) -> generation_pb2.GenerateResponse:
    """The reply to ``request_id``; ``total``: seconds since the request arrived."""
    return generation_pb2.GenerateResponse(
        request_id=request_id,
        images=[image_message(job, model, image, data=image.data) for image in finished.images],
        timings=timings_message(finished.stages, total),
        model=model.id,
        model_revision=model.revision,
    )


def image_message(
    job: Job, model: ModelInfo, image: FinishedImage, *, data: bytes
) -> generation_pb2.Image:
    """``image`` of ``job`` as a message, with ``data`` instead of its own."""
    return generation_pb2.Image(
        data=data,
        format=FORMAT_TO_WIRE[image.format],
        width=image.width,
        height=image.height,
        seed=image.seed,
        prompt_truncated=image.prompt_truncated,
        flagged=image.flagged,
        replay=generation_pb2.ReplayRecord(
            request=_replay_request(job, model, image.seed),
            model_revision=model.revision,
            scheduler_class=image.replay.scheduler_class,
            scheduler_config_json=image.replay.scheduler_config_json,
            dtype=model.runtime.dtype,
            device=image.replay.device,
            preset=model.runtime.preset,
            library_versions=image.replay.library_versions,
            rows_in_last_pass=image.replay.rows_in_last_pass,
            pixels_sha256=image.replay.pixels_sha256,
            channels_last=model.runtime.channels_last,
            memory_fallbacks=image.replay.memory_fallbacks,
            quantization=model.runtime.quantization,
            offload=model.runtime.offload,
            vae_channels_last=model.runtime.vae_channels_last,
        ),
    )


def _replay_request(job: Job, model: ModelInfo, seed: int) -> generation_pb2.GenerateRequest:
    """The request that reproduces one image of ``job`` alone, with every field that it needs."""
    options = {name: _field(value) for name, value in model.options_of(job).items()}
    if syntax := options.pop("prompt_syntax", None):
        options["prompt_syntax"] = SYNTAX_TO_WIRE[syntax]
    return generation_pb2.GenerateRequest(
        model=job.model,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=job.width,
        height=job.height,
        steps=job.steps,
        seed=seed,
        image_count=1,
        scheduler=SCHEDULER_TO_WIRE[job.scheduler],
        format=FORMAT_TO_WIRE[job.format],
        quality=job.quality if job.format.takes_quality else None,
        exact=job.exact,
        embed_record=job.embed_record,
        **options,
    )


def _field(value: Any) -> Any:
    """A field of a request as protobuf takes it; an image is the digest of its file."""
    match value:
        case InputImage(digest=digest):
            return image_pb2.ImageInput(upload_id=digest)
        case Lora():
            return generation_pb2.Lora(id=value.id, scale=value.scale)
        case Control():
            return generation_pb2.Control(
                id=value.id,
                image=_field(value.image),
                scale=value.scale,
                start=value.start,
                end=value.end,
            )
        case tuple():
            return [_field(each) for each in value]
    return value


def timings_message(stages: StageSeconds, total: float) -> generation_pb2.Timings:
    """Where the ``total`` seconds went."""
    return generation_pb2.Timings(
        queue=duration_message(stages.queue),
        encode_prompt=duration_message(stages.encode_prompt),
        denoise=duration_message(stages.denoise),
        decode=duration_message(stages.decode),
        encode_image=duration_message(stages.encode_image),
        total=duration_message(total),
    )


def duration_message(seconds: float) -> Duration:
    """``seconds`` as a message."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
