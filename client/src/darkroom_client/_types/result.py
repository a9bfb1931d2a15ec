"""What comes back from a call that drew images."""

from dataclasses import dataclass

from darkroom_client._types.image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went, in seconds.

    The stages of several images overlap, so that they may add up to more than ``total``.
    ``queue``: from arrival to the first denoiser pass, prompt encoding not counted.
    ``encode_prompt``: prompts to embeddings. ``denoise``: from the first denoiser pass to the
    last. ``decode``: latents to pixels. ``encode_image``: pixels to the format asked for.
    ``total``: from the request's arrival at the server to its response.
    """

    queue: float
    encode_prompt: float
    denoise: float
    decode: float
    encode_image: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The images of one request, in the order of their seeds, and how they came about."""

    request_id: str
    images: tuple[Image, ...]
    timings: Timings
    model: str
    model_revision: str
