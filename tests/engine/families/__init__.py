"""The families that suspend diffusers' own pipelines, with tiny models of each."""

from .aura_flow import CASES as AURA_FLOW
from .case import FamilyCase
from .chroma import CASES as CHROMA
from .flux import CASES as FLUX
from .flux_2 import CASES as FLUX_2
from .hidream import CASES as HIDREAM
from .hunyuan_image import CASES as HUNYUAN_IMAGE
from .kolors import CASES as KOLORS
from .lumina_2 import CASES as LUMINA_2
from .pixart import CASES as PIXART
from .qwen_image import CASES as QWEN_IMAGE
from .sana import CASES as SANA
from .stable_diffusion_3 import CASES as STABLE_DIFFUSION_3
from .stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL
from .z_image import CASES as Z_IMAGE

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
