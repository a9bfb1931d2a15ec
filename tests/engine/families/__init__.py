"""The families that suspend diffusers' own pipelines, with tiny models of each."""

from .case import FamilyCase
from .flux import CASES as FLUX
from .stable_diffusion_3 import CASES as STABLE_DIFFUSION_3
from .stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL

CASES: list[FamilyCase] = [
    *STABLE_DIFFUSION_XL,
    *FLUX,
    *STABLE_DIFFUSION_3,
    # One line for each file.
]
