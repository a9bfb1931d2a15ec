"""The replay record as text, as it travels in an image's file."""

import json
import struct
from collections.abc import Iterable
from typing import Any

from darkroom_server.core.events import Replay
from darkroom_server.core.inputs import Control, InputImage, Lora
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo

RECORD_VERSION = 1
"""The version of the document; ``ReplayRecord.from_json`` of the Python client reads it."""

MAX_JPEG_PROMPT_BYTES = 52 * 1024
"""The most bytes of all prompts in the record of a JPEG: its XMP has at most 65,502 bytes, and 12
KiB of them are for the rest of the record."""


def embedded_record(job: Job, seed: int, model: ModelInfo, replay: Replay) -> str:
    """The record of the image of ``seed``, as JSON in ASCII without ``&``, ``<`` and ``>``.

    It holds nothing that changes from call to call, so equal pixels of equal requests give equal
    files: no request id, no rows of a batch, no times. It has a field that 0.1.0 did not know only
    if the image needs it: clients of that version reject unknown fields.
    """
    newer: dict[str, Any] = {}
    if model.runtime.channels_last:
        newer["channels_last"] = True
    if model.runtime.other_vae_layout is not None:
        newer["vae_channels_last"] = model.runtime.other_vae_layout
    if replay.memory_fallbacks:
        newer["memory_fallbacks"] = replay.memory_fallbacks
    if model.runtime.quantization:
        newer["quantization"] = model.runtime.quantization
    if model.runtime.offload:
        newer["offload"] = model.runtime.offload
    return _plain_json(
        {
            "darkroom_replay": RECORD_VERSION,
            "request": {
                "prompt": job.prompt,
                "model": job.model,
                "negative_prompt": job.negative_prompt,
                "width": job.width,
                "height": job.height,
                "steps": job.steps,
                "guidance_scale": None,
                "seed": seed,
                "image_count": 1,
                "scheduler": job.scheduler.value,
                "format": job.format.value,
                "quality": job.quality if job.format.takes_quality else None,
                "exact": job.exact,
                "embed_record": True,
                **{name: _plain_value(value) for name, value in model.options_of(job).items()},
            },
            "model_revision": model.revision,
            "scheduler_class": replay.scheduler_class,
            "scheduler_config": json.loads(replay.scheduler_config_json),
            "dtype": model.runtime.dtype,
            "device": replay.device,
            "preset": model.runtime.preset,
            "library_versions": dict(sorted(replay.library_versions.items())),
            "pixels_sha256": replay.pixels_sha256,
            **newer,
        }
    )


def prompts_fit_in_jpeg(prompts: Iterable[str]) -> bool:
    """Whether a JPEG can hold the record of an image with these prompts and negative prompts."""
    return sum(len(_plain_json(prompt)) for prompt in prompts) <= MAX_JPEG_PROMPT_BYTES


def _plain_value(value: Any) -> Any:
    """A field of the request as JSON; an image is the digest of its file."""
    match value:
        case float():
            return _shortest_float32(value)
        case InputImage(digest=digest):
            return {"upload_id": digest}
        case (Lora(), *_):
            return {lora.id: _shortest_float32(lora.scale) for lora in value}
        case Control():
            return {name: _plain_value(getattr(value, name)) for name in value.__slots__}
        case tuple():
            return [_plain_value(each) for each in value]
    return value


def _plain_json(value: Any) -> str:
    """JSON that XML can hold as it is."""
    text = json.dumps(value, ensure_ascii=True)
    for character in "&<>":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _shortest_float32(value: float) -> float:
    """The shortest decimal of the same 32-bit float: 7.1, not 7.099999904632568."""
    bits = struct.pack("f", value)
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((short for short in candidates if struct.pack("f", short) == bits), value)
