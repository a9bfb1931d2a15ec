"""The job: one accepted request, as plain data that crosses process boundaries."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from darkroom_server.core.inputs import Control, InputImage, Lora

SEED_BOUND = 2**63
"""Seeds are chosen and counted modulo this, so that each fits a signed 64-bit integer."""

PROMPT_FIELDS = (
    "prompt",
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)
"""The fields of a job, and of a request, that are prompts."""

DEADLINE_SLACK_SECONDS = 0.25
"""A caller that cancels this shortly before its deadline did so because of the deadline.

The caller's own timer fires first, and gRPC rounds timeouts up on their way to the server.
"""


class ImageFormat(StrEnum):
    """How the pixels of an image are encoded."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW_RGB = "raw_rgb"

    @property
    def takes_record(self) -> bool:
        """True if a file of this format can hold the replay record."""
        return self is not ImageFormat.RAW_RGB

    @property
    def takes_quality(self) -> bool:
        """True if the encoding is lossy and has a quality of 1 to 100."""
        return self in (ImageFormat.JPEG, ImageFormat.WEBP)


class SchedulerName(StrEnum):
    """The noise schedulers that a request may name; a model may offer fewer."""

    DDIM = "ddim"
    DDPM = "ddpm"
    PNDM = "pndm"
    LMS = "lms"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    HEUN = "heun"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_2M_SDE_KARRAS = "dpmpp_2m_sde_karras"
    UNIPC = "unipc"
    DEIS = "deis"
    LCM = "lcm"
    FLOW_MATCH_EULER = "flow_match_euler"
    FLOW_MATCH_HEUN = "flow_match_heun"
    FLOW_MATCH_LCM = "flow_match_lcm"
    MODEL = "model"
    """The model's own, as its folder configures it."""


class PromptSyntax(StrEnum):
    """How a prompt is read: as it is, or with weights, such as ``a (red:1.3) circle``."""

    PLAIN = "plain"
    WEIGHTED = "weighted"


class Task(StrEnum):
    """What a job asks for; it follows from the fields that are set."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"
    EDIT = "edit"

    @classmethod
    def of(cls, *, image: object, mask_image: object, reference_images: object) -> "Task":
        """The task of what is set: None and empty are not."""
        if mask_image is not None:
            return cls.INPAINT
        if image is not None:
            return cls.IMAGE_TO_IMAGE
        return cls.EDIT if reference_images else cls.TEXT_TO_IMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted request, with the model's defaults filled in.

    ``id`` is unique among the jobs of one server. Times are ``time.monotonic`` seconds, which on
    Linux all processes of a machine share. A higher ``priority`` is more urgent. ``skip`` are the
    indices of images that an earlier engine finished. ``caller`` is the caller's name.
    ``preview_every``: a preview every that many steps, 0 for none. ``request_id`` and ``trace_id``
    are for the log. ``embed_record``: write the replay record into each image's file.

    The rest is for models that take it, see ``ModelInfo.optional_fields``, with the names of
    diffusers. ``prompt_2`` and ``prompt_3`` go to further text encoders, "" means ``prompt``; so
    with the negative prompts. An empty ``negative_prompt`` is the pipeline's None, unless
    ``empty_negative_prompt``. ``true_cfg_scale``: guidance of a model with embedded guidance, 1 for
    none. ``max_sequence_length``: tokens of the prompt, None for the pipeline's own number.

    ``image`` and ``mask_image`` have the size of the job's images, the mask one channel: white is
    generated again. ``strength``, above 0 to 1: how much of ``image`` is replaced.
    ``reference_images`` have sizes of their own; ``reference_pixels`` are those that the denoiser
    reads of them besides the image's, and that the model's measurements do not count.
    """

    id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: SchedulerName
    format: ImageFormat
    quality: int
    exact: bool
    submitted_at: float
    deadline: float | None = None
    priority: int = 0
    skip: frozenset[int] = frozenset()
    caller: str = ""
    preview_every: int = 0
    preview_format: ImageFormat = ImageFormat.JPEG
    request_id: str = ""
    trace_id: str = ""
    embed_record: bool = False
    prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_2: str = ""
    negative_prompt_3: str = ""
    empty_negative_prompt: bool = False
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN
    guidance_rescale: float = 0.0
    true_cfg_scale: float = 1.0
    max_sequence_length: int | None = None
    image: InputImage | None = None
    mask_image: InputImage | None = None
    strength: float = 1.0
    reference_images: tuple[InputImage, ...] = ()
    reference_pixels: int = 0
    loras: tuple[Lora, ...] = ()
    controls: tuple[Control, ...] = ()
    ip_adapter_image: InputImage | None = None
    ip_adapter_scale: float = 1.0

    @property
    def active_loras(self) -> tuple[Lora, ...]:
        """The adapters that have an effect: those whose scale is not 0."""
        return tuple(lora for lora in self.loras if lora.scale)

    @property
    def task(self) -> Task:
        """What this job asks for."""
        return Task.of(
            image=self.image,
            mask_image=self.mask_image,
            reference_images=self.reference_images,
        )

    @property
    def denoised_size(self) -> tuple[int, int]:
        """Width and height of an image that costs the denoiser as much as one of this job."""
        if not self.reference_pixels:
            return self.width, self.height
        scale = math.sqrt(1.0 + self.reference_pixels / (self.width * self.height))
        return round(self.width * scale), round(self.height * scale)

    @property
    def pictures(self) -> list[InputImage]:
        """Every picture that the job brings."""
        single = [self.image, self.mask_image, self.ip_adapter_image]
        controls = [control.image for control in self.controls]
        return [*filter(None, single), *self.reference_images, *controls]

    def without_pixels(self) -> Self:
        """This job with the digests and sizes of its pictures only."""

        def bare(picture: InputImage | None) -> InputImage | None:
            return picture and replace(picture, pixels=b"")

        return replace(
            self,
            image=bare(self.image),
            mask_image=bare(self.mask_image),
            ip_adapter_image=bare(self.ip_adapter_image),
            reference_images=tuple(replace(each, pixels=b"") for each in self.reference_images),
            controls=tuple(
                replace(control, image=replace(control.image, pixels=b""))
                for control in self.controls
            ),
        )

    @property
    def log_fields(self) -> dict[str, str]:
        """The fields of a log line about this job."""
        fields = {"job": self.id, "request_id": self.request_id, "trace_id": self.trace_id}
        return {name: value for name, value in fields.items() if value}

    @property
    def image_indices(self) -> list[int]:
        """The indices of the images to generate."""
        return [index for index in range(self.image_count) if index not in self.skip]

    def seed_of(self, image_index: int) -> int:
        """The seed that reproduces image ``image_index`` as a single image."""
        return (self.seed + image_index) % SEED_BOUND

    def wants_preview(self, step: int, steps: int) -> bool:
        """Whether a preview is due after ``step`` of ``steps``; never after the last one."""
        return self.preview_every > 0 and step % self.preview_every == 0 and step < steps

    @property
    def has_negative_prompt(self) -> bool:
        """Whether the pipeline gets a negative prompt."""
        return bool(self.negative_prompt) or self.empty_negative_prompt
