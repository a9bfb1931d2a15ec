"""The events of a job, one small dataclass each: a union for use with ``match``."""

from dataclasses import dataclass, field
from enum import StrEnum

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult


class FinishReason(StrEnum):
    """How a job finished; WITHHELD: the safety checker withheld at least one image."""

    COMPLETED = "completed"
    WITHHELD = "withheld"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The server accepted the request, and generates one image for each of ``seeds``.

    ``queue_position``: the number of jobs before it. ``estimated_start`` and ``estimated_finish``:
    seconds from now to the first step and to the last image; None if the server does not know
    yet. ``joined``: the job existed before this call, and does not run twice.
    ``server_id``: the name of the server that accepted it; empty from an older server.
    """

    request_id: str
    seeds: tuple[int, ...]
    queue_position: int
    estimated_start: float | None
    estimated_finish: float | None
    model: str
    model_revision: str
    joined: bool
    server_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The job waits; ``position`` jobs are before it."""

    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first step begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The server or its engine crashed: the progress starts again, finished images are kept.

    ``times``: how often that happened to this request so far.
    """

    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnecting:
    """No server has the call now; the stream tries again.

    ``attempt``: the number of the next try since the last answer, from 1. ``reason``: the server's
    reason, such as "MODEL_LOADING" or "DRAINING"; or "UNAVAILABLE" if no server answered, and
    gRPC's code for any other error of a connection.
    """

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """An image made a step; a slow reader gets fewer of these.

    ``image_index``: the image's index in the request, from 0. ``step`` of ``steps`` denoiser calls
    are done; some schedulers make more calls than the requested steps. ``rows``: rows of the pass
    that the step was part of. ``step_seconds``: the duration of that pass.
    """

    image_index: int
    step: int
    steps: int
    rows: int
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A small picture of an unfinished image; a slow reader gets fewer of these.

    ``data`` holds the pixels in ``format``; ``width`` and ``height`` are pixels.
    """

    image_index: int
    step: int
    data: bytes = field(repr=False)
    format: ImageFormat
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReady:
    """An image is finished; ``image_index`` is its index in the request, from 0."""

    image_index: int
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event: all images have arrived, and are in ``result``."""

    reason: FinishReason
    result: GenerationResult


Event = (
    Accepted
    | Queued
    | Started
    | Restarted
    | Reconnecting
    | Progress
    | Preview
    | ImageReady
    | Finished
)
"""The events that a stream yields."""
