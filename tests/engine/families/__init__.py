"""The families that suspend diffusers' own pipelines, with tiny models of each."""

from .case import FamilyCase
from .stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL
from .z_image import CASES as Z_IMAGE

CASES: list[FamilyCase] = [
    *STABLE_DIFFUSION_XL,
    *Z_IMAGE,
    # One line for each file.
]
