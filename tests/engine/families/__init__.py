"""The families that suspend diffusers' own pipelines, with tiny models of each."""

from .case import FamilyCase
from .sana import CASES as SANA
from .stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL

CASES: list[FamilyCase] = [
    *STABLE_DIFFUSION_XL,
    *SANA,
    # One line for each file.
]
