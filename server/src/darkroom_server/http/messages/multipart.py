"""Reads the form of an edit or a variation: its fields, and its pictures as they were sent."""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from darkroom_server.http.errors import HttpError
from darkroom_server.http.messages.fields import Field
from darkroom_server.service.request import ImageSource

MAX_FORM_BYTES = 32 * 1024**2
"""Of a whole form with its pictures."""

MAX_FIELDS = 64
MAX_PICTURES = 17
MAX_FIELD_BYTES = 64 * 1024

IMAGE_NAMES = ("image", "image[]")
MASK_NAME = "mask"

# It warns of every form that is damaged, and a caller may send as many as it likes.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")


class _InMemory(MultiPartParser):
    spool_max_size = MAX_FORM_BYTES

    def close(self) -> None:
        """Close the files, also those of a part without an end."""
        for file in self._files_to_close_on_error:
            file.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """``values`` are the fields as JSON would have them, ``images`` and ``mask`` files."""

    values: dict[str, Any]
    images: tuple[ImageSource, ...]
    mask: ImageSource | None


async def form_of(headers: Headers, body: bytes, fields: dict[str, Field]) -> Form:
    """The form in ``body``; raises ``HttpError``. ``fields``: what it may have besides pictures."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = "send a form with its pictures, with Content-Type: multipart/form-data"
        raise HttpError(415, "unsupported_content_type", message)
    # On a thread: the work grows with the pictures.
    return await asyncio.to_thread(lambda: asyncio.run(_form(headers, body, fields)))


async def _form(headers: Headers, body: bytes, fields: dict[str, Field]) -> Form:
    async def chunks() -> AsyncGenerator[bytes]:
        yield body

    parser = _InMemory(
        headers,
        chunks(),
        max_files=MAX_PICTURES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        return await _read(await parser.parse(), fields)
    except MultiPartException as error:
        raise HttpError(400, "invalid_form", f"the form cannot be read: {error.message}") from None
    except (KeyError, ValueError):
        raise HttpError(400, "invalid_form", "the form cannot be read") from None
    finally:
        parser.close()


async def _read(form: FormData, fields: dict[str, Field]) -> Form:
    values: dict[str, Any] = {}
    images: list[ImageSource] = []
    mask = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name == MASK_NAME:
                mask = _source(await value.read())
            elif name in IMAGE_NAMES:
                images.append(_source(await value.read()))
            else:
                values[name] = None if name in fields else ""  # An unknown field.
        else:
            values[name] = _value(value, fields.get(name))
    return Form(values=values, images=tuple(images), mask=mask)


def _source(data: bytes) -> ImageSource:
    return ImageSource(digest="sha256:" + hashlib.sha256(data).hexdigest(), data=data)


def _value(text: str, field: Field | None) -> Any:
    """The text of a field as JSON would have it; as it is if it cannot be that."""
    match field.type if field is not None else "":
        case "boolean" if text in ("true", "false"):
            return text == "true"
        case "integer" | "number" if NUMBER.fullmatch(text):
            return float(text) if set(text) & set(".eE") else int(text)
        case "array":
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                return text
    return text
