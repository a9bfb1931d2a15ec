"""What every peer is told at its start."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from bench.workload import Request
from darkroom_server.core.model import ModelRuntime

READY = "ready"
"""The line that a peer prints when it takes requests."""

FIELDS = ("index", "prompt", "steps", "guidance_scale", "seed", "width", "height")
"""What of a request goes over the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """``folder`` holds the model, ``port`` is on loopback, ``trace`` is the file for ``Trace``.

    ``widest`` is the most images of a batch, ``window`` the seconds that a batch waits for company.
    """

    folder: str
    runtime: ModelRuntime
    port: int
    trace: str
    widest: int
    window: float

    def arguments(self) -> list[str]:
        """For the command line of a peer's process."""
        return [json.dumps(asdict(self))]

    @classmethod
    def of_command_line(cls, description: str | None) -> Self:
        """What ``arguments`` made."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("serving", help="JSON")
        fields = json.loads(parser.parse_args().serving)
        return cls(**{**fields, "runtime": ModelRuntime(**fields["runtime"])})


def to_wire(request: Request) -> dict[str, Any]:
    """``request`` in JSON's types; unset fields are left out."""
    fields = {name: getattr(request, name) for name in FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def from_wire(fields: dict[str, Any]) -> Request:
    """What ``to_wire`` made."""
    return Request(**fields)


def by_settings(requests: Sequence[Request], most: int) -> list[list[Request]]:
    """``requests`` in calls of equal settings, at most ``most`` in each, the first come first."""
    calls: list[list[Request]] = []
    for request in requests:
        for call in calls:
            if call[0].settings == request.settings and len(call) < most:
                call.append(request)
                break
        else:
            calls.append([request])
    return calls
