"""What to generate, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypedDict

from darkroom_client._checks import check_text
from darkroom_client._types.enums import ImageFormat, PromptSyntax, Scheduler
from darkroom_client._types.inputs import Control, ImageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request: ``GenerationRequest("a star", steps=20)``.

    Each field but ``prompt`` may be unset, which means the model's default.

    ``model``: an id from ``Client.models``; may be empty if the server has a single model.
    ``negative_prompt``: what the images should not show; used if the image is guided.
    ``width``, ``height``: pixels, a multiple of 8 within the model's limits.
    ``steps``: denoising steps. ``guidance_scale``: classifier-free guidance; 1 and below mean
    none. ``seed``: 0 to 2^63 - 1; image i uses (seed + i) mod 2^63; if unset, the client picks a
    random one. ``quality``: 1 to 100, for JPEG and WebP. ``exact``: identical bytes
    whatever else the server is doing; slower. ``request_id``: at most 64 of A-Z a-z 0-9 . _ - ; if
    unset, the client picks a random one. ``embed_record``: the file of each image holds its replay
    record, the prompt included; not for RAW_RGB.

    Not every model takes the rest, nor ``negative_prompt``, ``guidance_scale`` and previews:
    ``Model.optional_fields`` lists what it takes, and the server rejects what it does not take.

    ``true_cfg_scale``: classifier-free guidance of a model with embedded guidance; 1 and below mean
    none, more needs a negative prompt. ``guidance_rescale``: 0 to 1, against overexposed images.
    ``max_sequence_length``: tokens of the prompt, at most the model's limit. ``prompt_2``,
    ``prompt_3``: prompts for the model's further text encoders; ``prompt`` if empty. So with
    ``negative_prompt_2`` and ``negative_prompt_3``. ``empty_negative_prompt``: an empty negative
    prompt, and not none; some models treat the two differently. ``prompt_syntax``: "plain" or
    "weighted", which reads weights such as ``a (red:1.3) circle`` in each prompt.

    ``image``: the image to start from. ``mask_image``: its white parts are generated again, its
    black ones stay; of the same size as ``image``. ``strength``: how much of ``image`` is
    replaced, above 0 to 1. Without ``width`` and ``height`` the size is that of ``image``.
    ``reference_images``: images to edit or to refer to. ``loras``: adapters by id, with their
    scales: ``{"outline": 0.8}``. ``controls``: ControlNets with their images.
    ``ip_adapter_image``: what an IP-Adapter takes the content or the style from;
    ``ip_adapter_scale``: how much of it, 0 to 1. An image is the bytes of a PNG, JPEG or WebP file,
    its path, or a ``PIL.Image.Image``; files are read when the request is sent.

    The server checks the bounds, and reports all violations at once.
    """

    prompt: str = field(kw_only=False)
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
    embed_record: bool = False
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    prompt_2: str = ""
    negative_prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_3: str = ""
    empty_negative_prompt: bool = False
    guidance_rescale: float | None = None
    prompt_syntax: PromptSyntax | str | None = None
    image: ImageSource | None = field(default=None, repr=False)
    mask_image: ImageSource | None = field(default=None, repr=False)
    strength: float | None = None
    reference_images: Sequence[ImageSource] = field(default=(), repr=False)
    loras: Mapping[str, float] | None = None
    controls: Sequence[Control] = field(default=(), repr=False)
    ip_adapter_image: ImageSource | None = field(default=None, repr=False)
    ip_adapter_scale: float | None = None


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of every generating call: the fields of ``GenerationRequest``."""

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
    embed_record: bool
    true_cfg_scale: float | None
    max_sequence_length: int | None
    prompt_2: str
    negative_prompt_2: str
    prompt_3: str
    negative_prompt_3: str
    empty_negative_prompt: bool
    guidance_rescale: float | None
    prompt_syntax: PromptSyntax | str | None
    image: ImageSource | None
    mask_image: ImageSource | None
    strength: float | None
    reference_images: Sequence[ImageSource]
    loras: Mapping[str, float] | None
    controls: Sequence[Control]
    ip_adapter_image: ImageSource | None
    ip_adapter_scale: float | None


def as_request(
    prompt: str | GenerationRequest, options: GenerationOptions | None = None
) -> GenerationRequest:
    """Make a request of a prompt and options, or copy a request with these options changed."""
    given: GenerationOptions = options or {}
    _check_names(given)
    if isinstance(prompt, GenerationRequest):
        return replace(prompt, **given)
    check_text("prompt", prompt)
    return GenerationRequest(prompt=prompt, **given)


_OTHER_NAMES = {
    "num_images": "image_count",
    "num_images_per_prompt": "image_count",
    "n": "image_count",
    "count": "image_count",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "size": "width and height",
    "generator": "seed",
    "sampler": "scheduler",
    "output_format": "format",
    "mask": "mask_image",
    "init_image": "image",
    "lora": "loras",
    "control_image": "controls",
    "images": "reference_images",
}
"""What other libraries call the fields."""


def _check_names(options: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for an option that a request does not have."""
    known = {field.name for field in fields(GenerationRequest)} - {"prompt"}
    for name in options:
        if name not in known:
            meant = _OTHER_NAMES.get(name)
            advice = f"use {meant}" if meant else f"the options are {', '.join(sorted(known))}"
            raise TypeError(f"{name} is not an option of a request: {advice}")
