"""Encode and decode the images and adapters of requests."""

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_client._checks import check_number, check_text
from darkroom_client._types.inputs import Control, ImageSource, UploadedImage
from darkroom_client._types.request import GenerationRequest
from darkroom_client._wire.values import decode_float

if TYPE_CHECKING:
    import PIL.Image

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def encode_inputs(request: GenerationRequest) -> dict[str, Any]:
    """The fields of the message for the images and adapters of ``request``.

    Raises ``TypeError`` for a value of the wrong type, ``OSError`` for a file that cannot be read.
    """
    return {
        "image": _optional_image("image", request.image),
        "mask_image": _optional_image("mask_image", request.mask_image),
        "strength": _number("strength", request.strength),
        "reference_images": [
            _image(f"reference_images[{index}]", image)
            for index, image in enumerate(_several("reference_images", request.reference_images))
        ],
        "loras": _loras(request.loras),
        "controls": [
            _control(f"controls[{index}]", control)
            for index, control in enumerate(_several("controls", request.controls))
        ],
        "ip_adapter_image": _optional_image("ip_adapter_image", request.ip_adapter_image),
        "ip_adapter_scale": _number("ip_adapter_scale", request.ip_adapter_scale),
    }


def decode_inputs(request: generation_pb2.GenerateRequest) -> dict[str, Any]:
    """The images and adapters of a message, as fields of ``GenerationRequest``."""
    has = request.HasField
    return {
        "image": _decode_image(request.image) if has("image") else None,
        "mask_image": _decode_image(request.mask_image) if has("mask_image") else None,
        "strength": decode_float(request.strength) if has("strength") else None,
        "reference_images": tuple(map(_decode_image, request.reference_images)),
        "loras": {
            lora.id: decode_float(lora.scale) if lora.HasField("scale") else 1.0
            for lora in request.loras
        }
        or None,
        "controls": tuple(map(_decode_control, request.controls)),
        "ip_adapter_image": (
            _decode_image(request.ip_adapter_image) if has("ip_adapter_image") else None
        ),
        "ip_adapter_scale": (
            decode_float(request.ip_adapter_scale) if has("ip_adapter_scale") else None
        ),
    }


def file_bytes(name: str, image: ImageSource) -> bytes:
    """The bytes of the picture's file; raises ``TypeError`` and ``OSError``."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if _is_pil(image):
        file = io.BytesIO()
        shown = image if image.mode in _PNG_MODES else image.convert("RGB")
        shown.save(file, "PNG", compress_level=1)
        return file.getvalue()
    raise TypeError(
        f"{name} is a {type(image).__name__}, must be bytes, a path, a PIL image or an "
        "UploadedImage"
    )


def _is_pil(image: object) -> "TypeGuard[PIL.Image.Image]":
    """Whether it is Pillow's; without importing that, for a caller that has one has imported it."""
    loaded = sys.modules.get("PIL.Image")
    return loaded is not None and isinstance(image, loaded.Image)


def with_images(request: GenerationRequest, images: Iterable[ImageSource]) -> GenerationRequest:
    """``request`` with ``images`` instead of the names of the same files.

    Raises ``ValueError`` for an image that it does not name.
    """
    files = {}
    for index, image in enumerate(images):
        data = file_bytes(f"images[{index}]", image)
        files["sha256:" + hashlib.sha256(data).hexdigest()] = data
    unused = dict.fromkeys(files)

    def resolved(image: Any) -> Any:
        if not isinstance(image, UploadedImage) or image.upload_id not in files:
            return image
        unused.pop(image.upload_id, None)
        return files[image.upload_id]

    changed = replace(
        request,
        image=resolved(request.image),
        mask_image=resolved(request.mask_image),
        reference_images=tuple(map(resolved, request.reference_images)),
        controls=tuple(replace(each, image=resolved(each.image)) for each in request.controls),
        ip_adapter_image=resolved(request.ip_adapter_image),
    )
    if unused:
        raise ValueError(
            f"the record does not name the image {next(iter(unused))}: pass the same files as "
            "for the first time"
        )
    return changed


def _image(name: str, image: ImageSource) -> image_pb2.ImageInput:
    if isinstance(image, UploadedImage):
        return image_pb2.ImageInput(upload_id=image.upload_id)
    return image_pb2.ImageInput(data=file_bytes(name, image))


def _optional_image(name: str, image: ImageSource | None) -> image_pb2.ImageInput | None:
    return None if image is None else _image(name, image)


def _number(name: str, value: float | None) -> float | None:
    if value is not None:
        check_number(name, value)
    return value


def _several(name: str, values: Any) -> Iterable[Any]:
    if isinstance(values, str | bytes | os.PathLike) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a {type(values).__name__}, must be a list")
    return values


def _loras(loras: Mapping[str, float] | None) -> list[generation_pb2.Lora]:
    if loras is None:
        return []
    if not isinstance(loras, Mapping):
        raise TypeError(f'loras is a {type(loras).__name__}, must be a dict: {{"outline": 0.8}}')
    for id, scale in loras.items():
        check_text("an id in loras", id)
        check_number(f"loras[{id!r}]", scale)
    return [generation_pb2.Lora(id=id, scale=scale) for id, scale in loras.items()]


def _control(name: str, control: Control) -> generation_pb2.Control:
    if not isinstance(control, Control):
        raise TypeError(f"{name} is a {type(control).__name__}, must be a Control")
    check_text(f"{name}.id", control.id)
    for field in ("scale", "start", "end"):
        check_number(f"{name}.{field}", getattr(control, field))
    return generation_pb2.Control(
        id=control.id,
        image=_image(f"{name}.image", control.image),
        scale=control.scale,
        start=control.start,
        end=control.end,
    )


def _decode_image(image: image_pb2.ImageInput) -> bytes | UploadedImage:
    return image.data if image.WhichOneof("source") == "data" else UploadedImage(image.upload_id)


def _decode_control(control: generation_pb2.Control) -> Control:
    return Control(
        control.id,
        _decode_image(control.image),
        scale=decode_float(control.scale) if control.HasField("scale") else 1.0,
        start=decode_float(control.start) if control.HasField("start") else 0.0,
        end=decode_float(control.end) if control.HasField("end") else 1.0,
    )
