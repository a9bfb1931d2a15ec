"""Pictures without a library: a gradient with colours of the seed."""

import hashlib
import json
import struct
import zlib
from dataclasses import replace

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client._errors import InvalidRequest, Violation
from darkroom_client._types.picture import PNG_KEYWORD
from darkroom_client._wire.results import decode_replay

DEFAULT_SIZE = 64
DEFAULT_STEPS = 4
DEFAULT_GUIDANCE = 7.5
REVISION = "fake"


def generate_image(request: generation_pb2.GenerateRequest, index: int) -> generation_pb2.Image:
    """Image ``index`` of ``request``, complete with its replay record."""
    alone = generation_pb2.GenerateRequest()
    alone.CopyFrom(request)
    alone.ClearField("request_id")
    alone.ClearField("on_disconnect")
    alone.seed, alone.image_count = (request.seed + index) % 2**63, 1
    alone.width = request.width if request.HasField("width") else DEFAULT_SIZE
    alone.height = request.height if request.HasField("height") else DEFAULT_SIZE
    alone.steps = steps_of(request)
    if not request.HasField("guidance_scale"):
        alone.guidance_scale = DEFAULT_GUIDANCE
    alone.format = request.format or types_pb2.IMAGE_FORMAT_PNG
    alone.scheduler = request.scheduler or types_pb2.SCHEDULER_EULER
    pixels = gradient(alone.seed, alone.width, alone.height)
    replay = generation_pb2.ReplayRecord(
        request=alone,
        model_revision=REVISION,
        scheduler_class="EulerDiscreteScheduler",
        scheduler_config_json=json.dumps({"steps_offset": 1}),
        dtype="float32",
        device="fake",
        preset="fast",
        rows_in_last_pass=1,
        pixels_sha256=hashlib.sha256(pixels).hexdigest(),
    )
    record = b""
    if request.embed_record:
        kept = replace(decode_replay(replay, ""), rows_in_last_pass=0)
        record = kept.to_json().encode()
    return generation_pb2.Image(
        data=encode(pixels, alone.width, alone.height, alone.format, record),
        format=alone.format,
        width=alone.width,
        height=alone.height,
        seed=alone.seed,
        replay=replay,
    )


def steps_of(request: generation_pb2.GenerateRequest) -> int:
    """The number of denoiser calls of ``request``."""
    return request.steps if request.HasField("steps") else DEFAULT_STEPS


def gradient(seed: int, width: int, height: int) -> bytes:
    """A gradient: ``height`` × ``width`` × 3 bytes of RGB."""
    red, green, blue = hashlib.sha256(str(seed).encode()).digest()[:3]
    row = b"".join(bytes([red, green * x // width, blue]) for x in range(width))
    return row * height


def encode(pixels: bytes, width: int, height: int, image_format: int, record: bytes = b"") -> bytes:
    """Encode ``pixels`` as a PNG with ``record``, or return them for RAW_RGB."""
    if image_format == types_pb2.IMAGE_FORMAT_RAW_RGB:
        return pixels
    rows = (pixels[at : at + width * 3] for at in range(0, len(pixels), width * 3))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 1)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    if record:
        # Keyword, two flags (not compressed), no language, no translated keyword, text.
        chunks.insert(1, (b"iTXt", PNG_KEYWORD + bytes(5) + record))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def check_format(request: generation_pb2.GenerateRequest) -> None:
    """Raise ``InvalidRequest`` for a format that needs a library."""
    if request.format not in (
        types_pb2.IMAGE_FORMAT_UNSPECIFIED,
        types_pb2.IMAGE_FORMAT_PNG,
        types_pb2.IMAGE_FORMAT_RAW_RGB,
    ):
        description = "the fake server supports png and raw_rgb only"
        raise InvalidRequest(
            f"format: {description}",
            violations=(Violation(field="format", description=description),),
        )
    if request.embed_record and request.format == types_pb2.IMAGE_FORMAT_RAW_RGB:
        description = "is for PNG, JPEG and WEBP, not for RAW_RGB"
        raise InvalidRequest(
            f"embed_record: {description}",
            violations=(Violation(field="embed_record", description=description),),
        )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
