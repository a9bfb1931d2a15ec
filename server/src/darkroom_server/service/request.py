"""A request for images, as any door receives it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller asks for, not yet validated. None means the model's default.

    ``model`` is "" if the caller named none. ``scheduler``, ``format``, ``preview_format`` and
    ``prompt_syntax`` are names as the caller wrote them, known or not. ``request_id`` is "" if the
    caller chose none.
    ``keep``: the job continues for a while after its last call disconnects.
    ``embed_record``: write the replay record into each image's file.
    ``preview_every``: a preview every N steps, 0 for none.
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
