"""The closed sets of names that a request chooses from."""

from enum import StrEnum
from typing import Self


class Scheduler(StrEnum):
    """A noise scheduler in diffusers' meaning of the word; calls take plain strings as well.

    Which of them a model offers, and with how many steps, is in ``Model.schedulers``.
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


class ImageFormat(StrEnum):
    """How the pixels of an image are encoded; calls take plain strings as well, "jpg" included.

    RAW_RGB is height × width × 3 bytes, row by row from the top left, without a header.
    """

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW_RGB = "raw_rgb"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The file name endings that go with this format, the usual one first."""
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
