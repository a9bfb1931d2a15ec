"""The configuration of a peer's server, and the form of the trace's requests on the wire."""

import base64
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from bench.peers.servers import config
from bench.trace.requests import Kind, TraceRequest
from bench.workload.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig(config.ServerConfig):
    """``folder`` holds a folder for each model, and ``loras`` are the files of adapters by id.

    ``swaps`` is the file for what the loads cost; see ``CostedLoads``. The device holds
    ``device_models`` models.
    """

    loras: Mapping[str, str]
    swaps: str
    device_models: int
    host_models: int
    load_scale: float


@dataclass(frozen=True, slots=True)
class ImageRequest(Request):
    """A request for one image of a model; ``image`` is the PNG file that it begins with, if any."""

    model: str = ""
    kind: Kind = Kind.TEXT
    loras: tuple[str, ...] = ()
    image: bytes = b""

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """Requests of one model with equal settings can share one call of a pipeline."""
        return (
            *(self.steps, self.guidance_scale, self.width, self.height),
            *(self.kind, self.loras),
        )

    def to_wire(self) -> dict[str, Any]:
        """In JSON's types, without the model, which has a place of its own in each protocol."""
        return config.to_wire(self) | {
            "kind": self.kind.value,
            "loras": list(self.loras),
            "image": base64.b64encode(self.image).decode(),
        }


def from_wire(body: Mapping[str, Any]) -> ImageRequest:
    """The inverse of ``ImageRequest.to_wire``."""
    return ImageRequest(
        **{
            **body,
            "kind": Kind(body["kind"]),
            "loras": tuple(body["loras"]),
            "image": base64.b64decode(body["image"]),
        }
    )


def image_requests(
    request: TraceRequest, *, prompt: str, side: int, loras: tuple[str, ...], picture: bytes
) -> list[ImageRequest]:
    """``request`` as one for each of its images, which are squares of ``side`` pixels.

    The first ones of ``loras`` are used, and ``picture`` if it begins with an image.
    """
    common = {field.name: getattr(request, field.name) for field in fields(Request)}
    changed: dict[str, Any] = {
        "prompt": prompt,
        "width": side,
        "height": side,
        "images": 1,
        "model": request.model,
        "kind": request.kind,
        "loras": loras[: request.loras],
        "image": b"" if request.kind is Kind.TEXT else picture,
    }
    return [
        ImageRequest(**{**common, **changed, "seed": request.seed + number})
        for number in range(request.images)
    ]
