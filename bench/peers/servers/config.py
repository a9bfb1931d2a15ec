"""The configuration of a peer's server, and the form of requests and images on the wire."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

from bench.workload.requests import Request
from darkroom_server.core.model_runtime import ModelRuntime

READY = "ready"
"""The line that a server prints when it accepts requests."""

FIELDS = ("index", "prompt", "steps", "guidance_scale", "seed", "width", "height")
"""The fields of a request that go over the wire."""


Wanted = TypeVar("Wanted", bound=Request)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """``folder`` holds the model, ``port`` is on loopback, ``trace`` is the file for ``Trace``.

    ``max_batch_images`` limits a batch, which waits at most ``batch_timeout`` seconds to fill.
    ``compiled`` is the file of the compiled UNet, "" for the eager one.
    """

    folder: str
    runtime: ModelRuntime
    port: int
    trace: str
    max_batch_images: int
    batch_timeout: float
    compiled: str = ""

    def arguments(self) -> list[str]:
        """The command line of a server's process."""
        return [json.dumps(asdict(self))]

    @classmethod
    def of_command_line(cls, description: str | None) -> Self:
        """The inverse of ``arguments``."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("config", help="JSON")
        fields = json.loads(parser.parse_args().config)
        return cls(**{**fields, "runtime": ModelRuntime(**fields["runtime"])})


def to_wire(request: Request) -> dict[str, Any]:
    """``request`` in JSON's types, without unset fields."""
    fields = {name: getattr(request, name) for name in FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def from_wire(fields: dict[str, Any]) -> Request:
    """The inverse of ``to_wire``."""
    return Request(**fields)


def by_settings(requests: Sequence[Wanted], max_images: int) -> list[list[Wanted]]:
    """``requests`` as calls of equal settings, at most ``max_images`` each, in order of arrival."""
    calls: list[list[Wanted]] = []
    for request in requests:
        for call in calls:
            if call[0].settings == request.settings and len(call) < max_images:
                call.append(request)
                break
        else:
            calls.append([request])
    return calls
