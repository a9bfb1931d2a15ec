"""The public surface: names, types, and the cost of the import."""

import dataclasses
import enum
import inspect
import json
import subprocess
import sys
import types
import typing
from typing import Any

import numpy
import PIL.Image
import pytest

import darkroom_client
from darkroom_client import AsyncClient, Client

NAMES = darkroom_client.__all__
CLASSES = [kind for name in NAMES if isinstance(kind := getattr(darkroom_client, name), type)]
STREAMING = {"stream", "watch", "generate_as_completed", "jobs"}
TIMES_GRPC = 5.0
"""The CPU time of an import of the client is less than this times that of grpc.aio."""


def test_every_public_name_has_a_docstring() -> None:
    assert all(kind.__doc__ for kind in CLASSES)


def test_nothing_else_is_public() -> None:
    public = {name for name in vars(darkroom_client) if not name.startswith("_")}

    assert public - {"cli", "testing"} == set(NAMES)


@pytest.mark.parametrize("kind", CLASSES)
def test_no_public_type_is_of_grpc_or_protobuf(kind: Any) -> None:
    for function in [kind.__init__, *public_functions(kind)]:
        for mentioned in mentioned_types(hints(function)):
            module = getattr(mentioned, "__module__", "")
            assert module.partition(".")[0] not in {"grpc", "google", "darkroom"}, function
    for base in kind.__mro__:
        assert base.__module__.partition(".")[0] not in {"grpc", "google", "darkroom"}


POSITIONAL: dict[type, list[str]] = {
    darkroom_client.GenerationRequest: ["prompt"],
    darkroom_client.Control: ["id", "image"],
    darkroom_client.UploadedImage: ["upload_id"],
}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if dataclasses.is_dataclass(kind)])
def test_data_is_frozen_slotted_and_keyword_only(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)
    positional = [field.name for field in dataclasses.fields(kind) if not field.kw_only]
    assert positional == POSITIONAL.get(kind, [])
    hints(kind)


@pytest.mark.parametrize("name", [name for name in dir(Client) if not name.startswith("_")])
def test_both_clients_have_the_same_surface(name: str) -> None:
    blocking, other = (inspect.getattr_static(kind, name) for kind in (Client, AsyncClient))

    assert (getattr(other, "__doc__", None) or "").strip()
    if not isinstance(blocking, property):
        ours, theirs = inspect.signature(blocking), inspect.signature(other)
        assert ours.parameters == theirs.parameters
        assert inspect.iscoroutinefunction(other) == (name not in STREAMING)
        if name not in STREAMING:
            assert ours == theirs
    assert {name for name in dir(AsyncClient) if not name.startswith("_")} == {
        name for name in dir(Client) if not name.startswith("_")
    }
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_the_options_are_the_fields_of_a_request() -> None:
    options = typing.get_type_hints(darkroom_client.GenerationOptions)

    assert options == {
        name: hint
        for name, hint in typing.get_type_hints(darkroom_client.GenerationRequest).items()
        if name != "prompt"
    }


def run(code: str) -> Any:
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return json.loads(out.stdout)


def test_nothing_heavy_is_imported() -> None:
    modules = run("import darkroom_client, json, sys; print(json.dumps(list(sys.modules)))")

    heavy = {"torch", "PIL", "numpy", "pydantic", "rich", "diffusers", "darkroom_server"}
    assert heavy.isdisjoint(name.partition(".")[0] for name in modules)


def test_it_is_imported_quickly() -> None:
    # CPU time beside that of gRPC, the best of three in turns: the machine's speed does not count.
    def cpu_seconds(module: str) -> float:
        code = "from time import process_time; start = process_time()"
        return float(run(f"{code}; import {module}; print(process_time() - start)"))

    names = ("grpc.aio", "darkroom_client")
    rounds = [[cpu_seconds(name) for name in names] for _ in range(3)]
    of_grpc, ours = (min(times) for times in zip(*rounds, strict=True))
    assert ours < TIMES_GRPC * of_grpc


def public_functions(kind: Any) -> list[Any]:
    if issubclass(kind, enum.Enum):
        return []
    found = [value for name, value in inspect.getmembers(kind) if not name.startswith("_")]
    functions = [value.fget if isinstance(value, property) else value for value in found]
    return [function for function in functions if inspect.isfunction(function)]


def hints(thing: Any) -> list[Any]:
    names = {"PIL": PIL, "numpy": numpy}
    try:
        return list(typing.get_type_hints(thing, localns=names).values())
    except TypeError:  # a slot wrapper: it has no hints
        return []


def mentioned_types(found: list[Any]) -> list[Any]:
    mentioned: list[Any] = []
    for hint in found:
        parts = list(typing.get_args(hint))
        origin = typing.get_origin(hint)
        if origin not in (None, typing.Union, types.UnionType):
            mentioned.append(origin)
        nested = [inner for part in parts if isinstance(part, list) for inner in part]
        plain = [part for part in parts if not isinstance(part, list)]
        mentioned.extend(mentioned_types([*nested, *plain]) if parts else [hint])
    return mentioned
