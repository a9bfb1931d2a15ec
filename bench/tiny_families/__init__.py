"""Tiny models of the families that suspend diffusers' own pipelines, and jobs for them."""

from bench.tiny_families.aura_flow import CASES as AURA_FLOW
from bench.tiny_families.case import FamilyCase
from bench.tiny_families.chroma import CASES as CHROMA
from bench.tiny_families.flux import CASES as FLUX
from bench.tiny_families.flux_2 import CASES as FLUX_2
from bench.tiny_families.hidream import CASES as HIDREAM
from bench.tiny_families.hunyuan_image import CASES as HUNYUAN_IMAGE
from bench.tiny_families.kolors import CASES as KOLORS
from bench.tiny_families.lumina_2 import CASES as LUMINA_2
from bench.tiny_families.pixart import CASES as PIXART
from bench.tiny_families.qwen_image import CASES as QWEN_IMAGE
from bench.tiny_families.sana import CASES as SANA
from bench.tiny_families.stable_diffusion_3 import CASES as STABLE_DIFFUSION_3
from bench.tiny_families.stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL
from bench.tiny_families.z_image import CASES as Z_IMAGE

CASES: list[FamilyCase] = [
    *STABLE_DIFFUSION_XL,
    *FLUX,
    *STABLE_DIFFUSION_3,
    *CHROMA,
    *AURA_FLOW,
    *PIXART,
    *Z_IMAGE,
    *QWEN_IMAGE,
    *FLUX_2,
    *LUMINA_2,
    *SANA,
    *HUNYUAN_IMAGE,
    *KOLORS,
    *HIDREAM,
    # One line for each file.
]

ONE_EACH: list[FamilyCase] = list(
    {case.write.__module__: case for case in reversed(CASES)}.values()
)
"""The first case of each file."""
