"""The names that a request can choose from."""

from enum import StrEnum
from typing import Self


class Scheduler(StrEnum):
    """A noise scheduler, as in diffusers; calls accept plain strings, too.

    ``Model.schedulers`` lists those that a model offers, with their range of steps.
    """

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


class PromptSyntax(StrEnum):
    """How a prompt is read; calls accept plain strings, too.

    PLAIN: as it is. WEIGHTED: with weights, such as ``a (red:1.3) circle``.
    """

    PLAIN = "plain"
    WEIGHTED = "weighted"


class ImageFormat(StrEnum):
    """The encoding of an image; calls accept plain strings, too, "jpg" included.

    RAW_RGB is height × width × 3 bytes, row by row from the top left, without a header.
    """

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW_RGB = "raw_rgb"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The file name suffixes of this format, the usual one first."""
        return _SUFFIXES[self]

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return cls("jpeg") if value == "jpg" else None


_SUFFIXES = {
    ImageFormat.PNG: (".png",),
    ImageFormat.JPEG: (".jpg", ".jpeg"),
    ImageFormat.WEBP: (".webp",),
    ImageFormat.RAW_RGB: (".rgb", ".raw"),
}
