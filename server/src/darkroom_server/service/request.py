"""A request for images, as any door receives it."""

from dataclasses import dataclass, field, fields

from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """A picture as a caller sent it, not decoded.

    ``digest``: "sha256:" and the SHA-256 of the file in hex, or whatever the caller sent as an
    upload id. ``data``: the file, None if the caller names an upload. Two sources are equal if
    their digests are.
    """

    digest: str
    data: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedControl:
    """A ControlNet as a caller asks for it; ``image`` is None if the caller sent none."""

    id: str
    image: ImageSource | None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The images and adapters of a request; None means the model's default."""

    image: ImageSource | None = None
    mask_image: ImageSource | None = None
    strength: float | None = None
    reference_images: tuple[ImageSource, ...] = ()
    loras: tuple[Lora, ...] = ()
    controls: tuple[RequestedControl, ...] = ()
    ip_adapter_image: ImageSource | None = None
    ip_adapter_scale: float | None = None

    @property
    def task(self) -> Task:
        """What these images ask for."""
        return Task.of(
            image=self.image,
            mask_image=self.mask_image,
            reference_images=self.reference_images,
        )


INPUT_FIELDS = tuple(field.name for field in fields(Inputs))
"""Those of ``OPTIONAL_FIELDS`` that are in ``GenerationRequest.inputs``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller asks for, not yet validated. None means the model's default.

    ``model`` is "" if the caller named none. ``scheduler``, ``format``, ``preview_format`` and
    ``prompt_syntax`` are names as the caller wrote them, known or not. ``request_id`` is "" if the
    caller chose none.
    ``keep``: the job continues for a while after its last call disconnects.
    ``embed_record``: write the replay record into each image's file.
    ``preview_every``: a preview every N steps, 0 for none.
    ``inputs`` is None if the caller set no field of it.
    """

    prompt: str
    negative_prompt: str = ""
    model: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    image_count: int | None = None
    scheduler: str | None = None
    format: str | None = None
    quality: int | None = None
    exact: bool = False
    embed_record: bool = False
    request_id: str = ""
    keep: bool = False
    preview_every: int = 0
    preview_format: str | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    prompt_2: str = ""
    negative_prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_3: str = ""
    empty_negative_prompt: bool = False
    guidance_rescale: float | None = None
    prompt_syntax: str | None = None
    inputs: Inputs | None = None
