"""The checks of a Darkroom server: all violations at once, in the server's words."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client._errors import InvalidRequest, ReplyTooLarge, Violation
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.model import OPTIONAL_FIELDS, Model, ModelLimits
from darkroom_client._wire.values import decode_format, decode_scheduler, decode_syntax
from darkroom_client.testing._models import as_float32, described, fill_defaults
from darkroom_client.testing._uploads import check_inputs

SEED_BOUND = 2**63
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ID_RULE = "must be at most 64 of A-Z a-z 0-9 . _ -"
MAX_JPEG_PROMPT_BYTES = 52 * 2**10
_MARKUP = re.compile("[&<>]")
LOSSY = (ImageFormat.JPEG, ImageFormat.WEBP)
PROMPTS = (
    "prompt",
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)

MAX_TIME_LIMIT_SECONDS = 366 * 86400.0
MAX_REPLY_BYTES = 64 * 2**20
OVERHEAD_BYTES = 64 * 2**10

NO_PREVIEWS = generation_pb2.PreviewOptions()


def invalid(*violations: Violation) -> InvalidRequest:
    """The error with ``violations``."""
    text = "; ".join(f"{each.field}: {each.description}" for each in violations)
    return InvalidRequest(text, violations=violations)


def check_request(
    request: generation_pb2.GenerateRequest,
    model: Model,
    preview: generation_pb2.PreviewOptions = NO_PREVIEWS,
) -> None:
    """Raise ``InvalidRequest`` with everything in ``request`` that ``model`` does not accept."""
    limits = described(model)[1]
    violations = (
        *_texts(request, model, limits),
        *_optional_fields(request, model, preview),
        *_scheduler(request, model),
        *_format(request),
        *_sizes(request, model, limits),
        *_steps(request, model),
        *_scale("guidance_scale", request, model, limits.max_guidance_scale),
        *_seed(request),
        *_between("image_count", request, 1, limits.max_image_count),
        *_quality(request, model),
        *_exact(request, model),
        *_record(request, model),
        *_preview(preview),
        *_scale("true_cfg_scale", request, model, limits.max_guidance_scale),
        *_scale("guidance_rescale", request, model, 1.0),
        *_sequence_length(request, model, limits),
        *_syntax(request),
        *check_inputs(request, model, limits, fill_defaults(request, model)),
        *_pairs_of_sizes(request, model, limits),
    )
    if violations:
        raise invalid(*violations)


def check_request_id(request_id: str) -> None:
    """Raise ``InvalidRequest`` if ``request_id`` cannot name a job."""
    if not REQUEST_ID.fullmatch(request_id):
        raise invalid(Violation(field="request_id", description=f"{ID_RULE}, and not empty"))


def check_time_limit(seconds: float | None) -> None:
    """Raise ``InvalidRequest`` for a time limit that no job can have."""
    if seconds is not None and not 0 < seconds < MAX_TIME_LIMIT_SECONDS:
        description = "must be more than nothing, at most a year"
        raise invalid(Violation(field="time_limit", description=description))


def check_reply(request: generation_pb2.GenerateRequest, model: Model, max_bytes: int) -> None:
    """Raise ``ReplyTooLarge`` if the reply in one message may have more than ``max_bytes``."""
    filled = fill_defaults(request, model)
    size = filled.image_count * (filled.width * filled.height * 3 + OVERHEAD_BYTES)
    limit = min(max_bytes, MAX_REPLY_BYTES)
    if size > limit:
        description = (
            f"{filled.image_count} of {filled.width}×{filled.height} pixels may make a reply of "
            f"{size} bytes, and the limit is {limit}; ask for fewer or smaller images, or a stream"
        )
        raise ReplyTooLarge(
            f"image_count: {description}",
            violations=(Violation(field="image_count", description=description),),
        )


def _takes(model: Model, name: str) -> bool:
    return name not in OPTIONAL_FIELDS or name in model.optional_fields


def _texts(
    request: generation_pb2.GenerateRequest, model: Model, limits: ModelLimits
) -> Iterator[Violation]:
    if not request.prompt:
        yield Violation(field="prompt", description="must not be empty")
    most = limits.max_prompt_bytes
    for name in PROMPTS:
        size = len(getattr(request, name).encode())
        if size > most and _takes(model, name):
            description = f"must be at most {most} bytes of UTF-8, and has {size}"
            yield Violation(field=name, description=description)
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        yield Violation(field="request_id", description=ID_RULE)


def _optional_fields(
    request: generation_pb2.GenerateRequest, model: Model, preview: generation_pb2.PreviewOptions
) -> Iterator[Violation]:
    takes = ", ".join(model.optional_fields) or "no optional field"
    for name in OPTIONAL_FIELDS:
        if not _takes(model, name) and _is_set(name, request, preview):
            field = "preview.every_steps" if name == "preview" else name
            description = f"model {model.id!r} does not take it; it takes {takes}"
            yield Violation(field=field, description=description)
    if (
        request.empty_negative_prompt
        and request.negative_prompt
        and _takes(model, "empty_negative_prompt")
    ):
        description = "must not be set with a negative_prompt"
        yield Violation(field="empty_negative_prompt", description=description)


def _is_set(name: str, request: Any, preview: generation_pb2.PreviewOptions) -> bool:
    match name:
        case "preview":
            return preview.every_steps > 0
        case "prompt_syntax":
            return bool(request.prompt_syntax == types_pb2.PROMPT_SYNTAX_WEIGHTED)
    field = request.DESCRIPTOR.fields_by_name[name]
    return bool(request.HasField(name) if field.has_presence else getattr(request, name))


def _sizes(
    request: generation_pb2.GenerateRequest, model: Model, limits: ModelLimits
) -> Iterator[Violation]:
    filled = fill_defaults(request, model)
    for name in ("width", "height"):
        yield from _between(name, request, limits.min_size, limits.max_size)
        size = getattr(filled, name)
        if size % limits.size_multiple:
            description = f"must be a multiple of {limits.size_multiple}, not {size}"
            yield Violation(field=name, description=description)


def _pairs_of_sizes(
    request: generation_pb2.GenerateRequest, model: Model, limits: ModelLimits
) -> Iterator[Violation]:
    filled = fill_defaults(request, model)
    width, height = filled.width, filled.height
    in_bounds = next(_sizes(request, model, limits), None) is None
    if in_bounds and limits.sizes and (width, height) not in limits.sizes:
        nearest = min(
            limits.sizes, key=lambda size: abs(math.log(size[0] / size[1] * height / width))
        )
        description = (
            f"model {model.id!r} makes certain sizes only, not {width}×{height}; the one of the "
            f"nearest shape is {nearest[0]}×{nearest[1]}"
        )
        yield Violation(field="width", description=description)


def _scheduler(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    if not request.scheduler:
        return
    scheduler = decode_scheduler(request.scheduler)
    if scheduler is None:
        description = f"{request.scheduler} is not a scheduler that this server knows"
        yield Violation(field="scheduler", description=description)
    elif scheduler not in (offer.scheduler for offer in model.schedulers):
        offers = ", ".join(offer.scheduler for offer in model.schedulers)
        description = f"model {model.id!r} offers {offers}, not {scheduler}"
        yield Violation(field="scheduler", description=description)


def _steps(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    filled = fill_defaults(request, model)
    scheduler = decode_scheduler(filled.scheduler)
    # An unknown scheduler is a violation of its own: any range will do for the steps.
    offers = [offer for offer in model.schedulers if offer.scheduler is scheduler]
    offers = offers or list(model.schedulers)
    low = min(offer.min_steps for offer in offers)
    high = max(offer.max_steps for offer in offers)
    if not request.HasField("steps") and not low <= filled.steps <= high:
        description = (
            f"must be set for {scheduler}, which takes {low} to {high}: the model's default is "
            f"{filled.steps}"
        )
        yield Violation(field="steps", description=description)
    yield from _between("steps", request, low, high)


def _scale(name: str, request: Any, model: Model, most: float) -> Iterator[Violation]:
    value = getattr(request, name)
    within = math.isfinite(value) and 0.0 <= value <= as_float32(most)
    if request.HasField(name) and _takes(model, name) and not within:
        yield Violation(field=name, description=f"must be 0 to {most:g}, not {value:g}")


def _sequence_length(
    request: generation_pb2.GenerateRequest, model: Model, limits: ModelLimits
) -> Iterator[Violation]:
    if _takes(model, "max_sequence_length"):
        yield from _between("max_sequence_length", request, 1, limits.max_sequence_length)


def _syntax(request: generation_pb2.GenerateRequest) -> Iterator[Violation]:
    # Unlike a Darkroom server, the fake one does not parse the weights of a prompt.
    if request.prompt_syntax and decode_syntax(request.prompt_syntax) is None:
        description = f"{request.prompt_syntax} is not a prompt syntax that this server knows"
        yield Violation(field="prompt_syntax", description=description)


def _seed(request: generation_pb2.GenerateRequest) -> Iterator[Violation]:
    if request.HasField("seed") and request.seed < 0:
        description = f"must be 0 to {SEED_BOUND - 1}, not {request.seed}"
        yield Violation(field="seed", description=description)


def _format(request: generation_pb2.GenerateRequest) -> Iterator[Violation]:
    if request.format and decode_format(request.format) is None:
        description = f"{request.format} is not a format that this server knows"
        yield Violation(field="format", description=description)


def _quality(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    image_format = decode_format(fill_defaults(request, model).format)
    if request.HasField("quality") and image_format is not None and image_format not in LOSSY:
        description = f"is for JPEG and WEBP only, not for {image_format.name}"
        yield Violation(field="quality", description=description)
    else:
        yield from _between("quality", request, 1, 100)


def _exact(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    stored = model.runtime.quantization if model.runtime is not None else ""
    if request.exact and "fp8-dynamic" in stored.split(", "):
        description = (
            f"model {model.id!r} multiplies in 8-bit floats with scales of each call "
            "(--quantize fp8-dynamic), for which equal bytes are not promised; leave it unset"
        )
        yield Violation(field="exact", description=description)


def _record(request: generation_pb2.GenerateRequest, model: Model) -> Iterator[Violation]:
    image_format = decode_format(fill_defaults(request, model).format)
    if not request.embed_record or image_format is None:
        return
    if image_format is ImageFormat.RAW_RGB:
        description = f"is for PNG, JPEG and WEBP, not for {image_format.name}"
        yield Violation(field="embed_record", description=description)
    elif image_format is ImageFormat.JPEG:
        # Each of & < > is written as six characters.
        prompts = [json.dumps(getattr(request, name)) for name in PROMPTS]
        size = sum(len(text) + 5 * len(_MARKUP.findall(text)) for text in prompts)
        if size > MAX_JPEG_PROMPT_BYTES:
            description = "the prompts are too long for a JPEG's XMP; ask for PNG"
            yield Violation(field="embed_record", description=description)


def _preview(preview: generation_pb2.PreviewOptions) -> Iterator[Violation]:
    if preview.every_steps < 0:
        description = f"must be 0 or more, not {preview.every_steps}"
        yield Violation(field="preview.every_steps", description=description)
    if preview.format and decode_format(preview.format) not in LOSSY:
        yield Violation(field="preview.format", description="must be JPEG or WEBP")


def _between(name: str, request: Any, low: int, high: int) -> Iterator[Violation]:
    value = getattr(request, name)
    if request.HasField(name) and not low <= value <= high:
        yield Violation(field=name, description=f"must be {low} to {high}, not {value}")
