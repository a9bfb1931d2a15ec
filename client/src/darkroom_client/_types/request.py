"""What to draw, as plain data."""

from dataclasses import dataclass, replace
from typing import TypedDict

from darkroom_client._checks import check_text
from darkroom_client._types.enums import ImageFormat, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request; everything but ``prompt`` may stay unset and then means the model's default.

    ``model``: an id from ``Client.models``; may stay empty where the server holds a single one.
    ``negative_prompt``: what the images should not show; used when guidance is above 1.
    ``width``, ``height``: pixels, a multiple of 8 within the model's limits.
    ``steps``: denoising steps. ``guidance_scale``: classifier-free guidance; 1 and below mean
    none. ``seed``: 0 to 2^63 - 1; image i is drawn from (seed + i) mod 2^63; unset, the client
    draws one. ``quality``: 1 to 100, for JPEG and WebP. ``exact``: identical bytes whatever else
    the server is doing, at some cost. ``request_id``: at most 64 of A-Z a-z 0-9 . _ - ; unset,
    the client draws one.

    The bounds are the server's to check, and it reports every violation at once.
    """

    prompt: str
    model: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    image_count: int | None = None
    scheduler: Scheduler | str | None = None
    format: ImageFormat | str | None = None
    quality: int | None = None
    exact: bool = False
    request_id: str | None = None


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of every call that draws: the fields of ``GenerationRequest``."""

    model: str
    negative_prompt: str
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int | None
    image_count: int | None
    scheduler: Scheduler | str | None
    format: ImageFormat | str | None
    quality: int | None
    exact: bool
    request_id: str | None


def as_request(
    prompt: str | GenerationRequest, options: GenerationOptions | None = None
) -> GenerationRequest:
    """A prompt with its options as a request; of a request, a copy with these options changed."""
    given: GenerationOptions = options or {}
    if isinstance(prompt, GenerationRequest):
        return replace(prompt, **given)
    check_text("prompt", prompt)
    return GenerationRequest(prompt=prompt, **given)
