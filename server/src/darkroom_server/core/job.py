"""The job: one accepted request, as plain data that crosses process boundaries."""

from dataclasses import dataclass
from enum import StrEnum

SEED_BOUND = 2**63
"""Seeds are chosen and counted modulo this, so that each fits a signed 64-bit integer."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted request, with the model's defaults filled in.

    ``id`` is unique among the jobs of one server. Times are ``time.monotonic`` seconds, which on
    Linux all processes of a machine share. A higher ``priority`` is more urgent. ``skip`` are the
    indices of images that an earlier engine finished. ``caller`` is the caller's name.
    ``preview_every``: a preview every that many steps, 0 for none. ``request_id`` and ``trace_id``
    are for the log. ``embed_record``: write the replay record into each image's file.
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
    def rows_per_image(self) -> int:
        """Rows of one image in a batch: two with classifier-free guidance, else one."""
        return 2 if self.guidance_scale > 1.0 else 1
