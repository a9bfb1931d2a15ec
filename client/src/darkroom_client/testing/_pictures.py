"""Pictures of the fake server: a gradient with colours of the seed."""

import hashlib
import importlib.util
import io
import json
import struct
import zlib
from dataclasses import replace
from typing import Any
from xml.sax.saxutils import escape

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client._errors import InvalidRequest, Violation
from darkroom_client._types.model import Model
from darkroom_client._types.picture import PNG_KEYWORD
from darkroom_client._wire.results import decode_replay
from darkroom_client.testing._uploads import name_by_digest

DEFAULT_QUALITY = 90
_XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:darkroom="urn:darkroom:v1">'
    "<darkroom:record>{record}</darkroom:record>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
LOSSY = (types_pb2.IMAGE_FORMAT_JPEG, types_pb2.IMAGE_FORMAT_WEBP)


def generate_image(
    request: generation_pb2.GenerateRequest, index: int, model: Model
) -> generation_pb2.Image:
    """Image ``index`` of ``request``, complete with its replay record.

    ``request`` has every default of ``model`` filled in.
    """
    alone = generation_pb2.GenerateRequest()
    alone.CopyFrom(request)
    alone.ClearField("request_id")
    alone.ClearField("on_disconnect")
    name_by_digest(alone)
    alone.seed, alone.image_count = (request.seed + index) % 2**63, 1
    pixels = gradient(alone.seed, alone.width, alone.height)
    runtime = model.runtime
    replay = generation_pb2.ReplayRecord(
        request=alone,
        model_revision=model.revision,
        scheduler_class="EulerDiscreteScheduler",
        scheduler_config_json=json.dumps({"steps_offset": 1}),
        dtype=runtime.dtype if runtime else "",
        device=runtime.device if runtime else "",
        preset=runtime.preset if runtime else "",
        rows_in_last_pass=1,
        pixels_sha256=hashlib.sha256(pixels).hexdigest(),
        channels_last=runtime.channels_last if runtime else False,
        quantization=runtime.quantization if runtime else "",
        offload=runtime.offload if runtime else "",
        vae_channels_last=runtime.vae_channels_last if runtime else None,
    )
    record = ""
    if request.embed_record:
        record = replace(decode_replay(replay, ""), rows_in_last_pass=0).to_json()
    quality = alone.quality if alone.HasField("quality") else DEFAULT_QUALITY
    return generation_pb2.Image(
        data=encode(pixels, alone.width, alone.height, alone.format, quality, record),
        format=alone.format,
        width=alone.width,
        height=alone.height,
        seed=alone.seed,
        replay=replay,
    )


def gradient(seed: int, width: int, height: int) -> bytes:
    """A gradient: ``height`` × ``width`` × 3 bytes of RGB."""
    red, green, blue = hashlib.sha256(str(seed).encode()).digest()[:3]
    row = b"".join(bytes([red, green * x // width, blue]) for x in range(width))
    return row * height


def encode(
    pixels: bytes,
    width: int,
    height: int,
    image_format: int,
    quality: int = DEFAULT_QUALITY,
    record: str = "",
) -> bytes:
    """Encode ``pixels`` with ``record``; RAW_RGB returns them. JPEG and WebP need Pillow."""
    if image_format == types_pb2.IMAGE_FORMAT_RAW_RGB:
        return pixels
    if image_format in LOSSY:
        return _encode_lossy(pixels, width, height, image_format, quality, record)
    rows = (pixels[at : at + width * 3] for at in range(0, len(pixels), width * 3))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 1)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    if record:
        # Keyword, two flags (not compressed), no language, no translated keyword, text.
        chunks.insert(1, (b"iTXt", PNG_KEYWORD + bytes(5) + record.encode()))
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


def _encode_lossy(
    pixels: bytes, width: int, height: int, image_format: int, quality: int, record: str
) -> bytes:
    import PIL.Image

    options: dict[str, Any] = {"quality": quality}
    if record:
        options["xmp"] = _XMP.format(record=escape(record)).encode()
    name = "JPEG" if image_format == types_pb2.IMAGE_FORMAT_JPEG else "WEBP"
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (width, height), pixels).save(file, name, **options)
    return file.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
