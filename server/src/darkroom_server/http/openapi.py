"""Prints openapi.json: ``python -m darkroom_server.http.openapi``."""

import json
from importlib.resources import files
from typing import Any

from darkroom_server.http.call import ID_HEADER, KEY_HEADER, TIMEOUT_HEADER
from darkroom_server.http.messages.fields import FIELDS, FORM_FIELDS
from darkroom_server.http.signed_urls import PATH

DOCUMENT = files("darkroom_server.http") / "openapi.json"
"""What ``/openapi.json`` serves; a test checks that it is current."""

HEADERS = {
    KEY_HEADER: "Names the job within its caller: a request with the same key joins it.",
    ID_HEADER: "Returned and logged.",
    TIMEOUT_HEADER: "Seconds until the caller's deadline; the server plans with it.",
}


def document() -> dict[str, Any]:
    """The API in OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Darkroom",
            "version": "1",
            "description": "OpenAI's images API with fields of Darkroom beside. See docs/http.md.",
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "ImageRequest": _object({n: f.schema for n, f in FIELDS.items()}, ["prompt"]),
                "Image": IMAGE,
                "Images": IMAGES,
                "Estimate": ESTIMATE,
                "Model": MODEL,
                "Models": _object({"object": _text(), "data": _list(_ref("Model"))}),
                "Status": {"type": "object"},
                "Error": ERROR,
            },
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/images/generations": {
                "post": _operation(
                    "Generate images",
                    "Images",
                    body=True,
                    stream="With `stream`: the events `image_generation.partial_image` and "
                    "`image_generation.completed`, and those of `darkroom.…` with `progress`.",
                )
            },
            "/v1/images/edits": {"post": _form_operation("Change images", mask=True)},
            "/v1/images/variations": {"post": _form_operation("Vary an image", mask=False)},
            "/v1/images/estimate": {
                "post": _operation("Estimate a request without running it", "Estimate", body=True)
            },
            PATH: {"get": _file_operation()},
            "/v1/models": {"get": _operation("List the models", "Models")},
            "/v1/models/{model}": {
                "get": {
                    **_operation("Describe a model", "Model"),
                    "parameters": [_path_parameter("model")],
                }
            },
            "/v1/status": {"get": _operation("Report the server's state, for admins", "Status")},
            "/health": {"get": _open(_operation("Whether the process lives", "Status"))},
            "/ready": {"get": _open(_operation("Whether the server accepts jobs", "Status"))},
            "/openapi.json": {"get": _open(_operation("This document", "Status"))},
        },
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def _whole() -> dict[str, Any]:
    return {"type": "integer"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


IMAGE = {
    "type": "object",
    "properties": {
        "b64_json": {"type": ["string", "null"], "description": "null if it was withheld."},
        "url": _text(),
        "seed": _whole(),
        "prompt_truncated": {"type": "boolean"},
        "flagged": {"type": "boolean"},
        "record": {"type": "object", "description": "What reproduces the image."},
    },
}

USAGE = {
    "type": "object",
    "properties": {
        "input_tokens": _whole(),
        "input_tokens_details": {"type": "object"},
        "output_tokens": _whole(),
        "total_tokens": _whole(),
    },
}

IMAGES = {
    "type": "object",
    "properties": {
        "created": _whole(),
        "background": _text(),
        "output_format": _text(),
        "quality": _text(),
        "size": _text(),
        "usage": USAGE,
        "darkroom": {"type": "object"},
        "data": _list(_ref("Image")),
    },
}

ESTIMATE = {
    "type": "object",
    "properties": {
        "queue_wait_seconds": {"type": ["number", "null"]},
        "run_seconds": {"type": ["number", "null"]},
        "peak_bytes": _whole(),
        "available_bytes": _whole(),
    },
}

MODEL = {
    "type": "object",
    "properties": {
        "id": _text(),
        "object": _text(),
        "created": _whole(),
        "owned_by": _text(),
        "ready": {"type": "boolean"},
        "tasks": _list(_text()),
    },
}

VIOLATION = _object({"field": _text(), "description": _text()})

ERROR = _object(
    {
        "error": {
            "type": "object",
            "properties": {
                "message": _text(),
                "type": _text(),
                "param": {"type": ["string", "null"]},
                "code": _text(),
                "violations": _list(VIOLATION),
            },
        }
    }
)


def _operation(
    summary: str, answer: str, *, body: bool = False, stream: str = ""
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if stream:
        content["text/event-stream"] = {"schema": _text(description=stream)}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": content},
            "default": {
                "description": "An error, with every violation.",
                "content": {"application/json": {"schema": _ref("Error")}},
            },
        },
    }
    if body:
        json_body = {"application/json": {"schema": _ref("ImageRequest")}}
        operation["requestBody"] = {"required": True, "content": json_body}
        operation["parameters"] = [
            {"name": name, "in": "header", "description": help, "schema": _text()}
            for name, help in HEADERS.items()
        ]
    return operation


def _open(operation: dict[str, Any]) -> dict[str, Any]:
    return {**operation, "security": []}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _text()}


def _file_operation() -> dict[str, Any]:
    names = ("caller", "request_id", "file")
    query = [
        {"name": name, "in": "query", "required": True, "schema": _text()}
        for name in ("expires", "signature")
    ]
    return {
        "summary": "Fetch an image by its signed URL",
        "security": [],
        "parameters": [*map(_path_parameter, names), *query],
        "responses": {
            "200": {"description": "The image", "content": {"image/*": {}}},
            "404": {"description": "The URL is not valid, or the result is no longer kept."},
        },
    }


def _form_operation(summary: str, *, mask: bool) -> dict[str, Any]:
    picture = {"type": "string", "format": "binary"}
    pictures = {"image": picture, "image[]": _list(picture), **({"mask": picture} if mask else {})}
    schema = _object({**pictures, **{n: f.schema for n, f in FORM_FIELDS.items()}})
    operation = _operation(summary, "Images", body=True)
    operation["requestBody"]["content"] = {"multipart/form-data": {"schema": schema}}
    return operation


def text() -> str:
    """The document as it is checked in."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
