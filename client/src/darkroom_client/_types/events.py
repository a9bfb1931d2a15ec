"""What happens to a generation, one small dataclass each: a union that is fit for ``match``."""

from dataclasses import dataclass, field
from enum import StrEnum

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult


class FinishReason(StrEnum):
    """How a generation ended well; WITHHELD: the safety checker kept at least one image back."""

    COMPLETED = "completed"
    WITHHELD = "withheld"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The server took the request, and will draw one image of each of ``seeds``.

    ``queue_position``: how many jobs go before it. ``estimated_start`` and ``estimated_finish``:
    seconds from now to the first step and to the last image; None where the server does not know
    yet. ``joined``: the server had this request before, and does not draw it twice.
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
    """The request waits; ``position`` jobs go before it."""

    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first step begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The server, or its engine, died: the progress starts over, finished images are kept.

    ``times``: how often that happened to this request so far.
    """

    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """An image took a step; a slow reader gets fewer of these.

    ``image_index``: which image of the request, from 0. ``step`` of ``steps`` denoiser calls are
    done; some schedulers make more of them than were asked for. ``rows``: rows of the pass that
    the step was part of. ``step_seconds``: what that pass took.
    """

    image_index: int
    step: int
    steps: int
    rows: int
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What an image looks like so far, small; a slow reader gets fewer of these.

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
    """An image is finished and here; ``image_index`` counts the request's images from 0."""

    image_index: int
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event: every image is here, all of them in ``result``."""

    reason: FinishReason
    result: GenerationResult


Event = Accepted | Queued | Started | Restarted | Progress | Preview | ImageReady | Finished
"""Everything that a stream yields."""
