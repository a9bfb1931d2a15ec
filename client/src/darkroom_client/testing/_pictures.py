"""Pictures of the fake server: a gradient with colours of the seed."""

import hashlib
import importlib.util
import io
import json
import struct
import zlib

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client._errors import InvalidRequest, Violation
from darkroom_client._types.model import Model

DEFAULT_QUALITY = 90
LOSSY = (types_pb2.IMAGE_FORMAT_JPEG, types_pb2.IMAGE_FORMAT_WEBP)


def generate_image(
    request: generation_pb2.GenerateRequest, index: int, model: Model
) -> generation_pb2.Image:
    """Image ``index`` of ``request``, complete with its replay record.

    ``request`` has every default of ``model`` filled in.
    """
    alone = generation_pb2.GenerateRequest()
    alone.CopyFrom(request)
    alone.seed, alone.image_count = (request.seed + index) % 2**63, 1
    pixels = gradient(alone.seed, alone.width, alone.height)
    runtime = model.runtime
    return generation_pb2.Image(
        data=encode(pixels, alone.width, alone.height, alone.format, alone.quality),
        format=alone.format,
        width=alone.width,
        height=alone.height,
        seed=alone.seed,
        replay=generation_pb2.ReplayRecord(
            request=alone,
            model_revision=model.revision,
            scheduler_class="EulerDiscreteScheduler",
            scheduler_config_json=json.dumps({"steps_offset": 1}),
            dtype=runtime.dtype if runtime else "",
            device=runtime.device if runtime else "",
            preset=runtime.preset if runtime else "",
            rows_in_last_pass=1,
            pixels_sha256=hashlib.sha256(pixels).hexdigest(),
        ),
    )


def gradient(seed: int, width: int, height: int) -> bytes:
    """A gradient: ``height`` × ``width`` × 3 bytes of RGB."""
    red, green, blue = hashlib.sha256(str(seed).encode()).digest()[:3]
    row = b"".join(bytes([red, green * x // width, blue]) for x in range(width))
    return row * height


def encode(
    pixels: bytes, width: int, height: int, image_format: int, quality: int = DEFAULT_QUALITY
) -> bytes:
    """Encode ``pixels``; JPEG and WebP need Pillow, and RAW_RGB returns them as they are."""
    if image_format == types_pb2.IMAGE_FORMAT_RAW_RGB:
        return pixels
    if image_format in LOSSY:
        return _encode_lossy(pixels, width, height, image_format, quality)
    rows = (pixels[at : at + width * 3] for at in range(0, len(pixels), width * 3))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 1)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def has_pillow() -> bool:
    """Whether JPEG and WebP can be made."""
    return importlib.util.find_spec("PIL") is not None


def check_format(image_format: int) -> None:
    """Raise ``InvalidRequest`` for JPEG and WebP if Pillow is not installed."""
    if image_format in LOSSY and not has_pillow():
        description = (
            "the fake server needs Pillow for jpeg and webp: pip install 'darkroom-client[pil]'"
        )
        raise InvalidRequest(
            f"format: {description}",
            violations=(Violation(field="format", description=description),),
        )


def _encode_lossy(pixels: bytes, width: int, height: int, image_format: int, quality: int) -> bytes:
    import PIL.Image

    name = "JPEG" if image_format == types_pb2.IMAGE_FORMAT_JPEG else "WEBP"
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (width, height), pixels).save(file, name, quality=quality)
    return file.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
