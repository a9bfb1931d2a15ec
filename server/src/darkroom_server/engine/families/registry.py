"""The registry of families: a pipeline's class decides how it is loaded and served."""

from collections.abc import Mapping
from typing import Any

import diffusers

from darkroom_server.core.errors import StartupError
from darkroom_server.engine.families.aura_flow import AuraFlow
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.chroma import Chroma
from darkroom_server.engine.families.flux import Flux, FluxKontext
from darkroom_server.engine.families.flux_2 import Flux2, Flux2Klein
from darkroom_server.engine.families.hidream import HiDream
from darkroom_server.engine.families.hunyuan_image import HunyuanImage
from darkroom_server.engine.families.inpainting import (
    StableDiffusionInpaint,
    StableDiffusionXLInpaint,
)
from darkroom_server.engine.families.kolors import Kolors
from darkroom_server.engine.families.lumina_2 import Lumina2
from darkroom_server.engine.families.pixart import PixArtAlpha, PixArtSigma
from darkroom_server.engine.families.qwen_image import QwenImage
from darkroom_server.engine.families.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from darkroom_server.engine.families.sana import Sana, SanaSprint
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.families.stable_diffusion_3 import StableDiffusion3
from darkroom_server.engine.families.stable_diffusion_xl import StableDiffusionXL
from darkroom_server.engine.families.undescribed_class import undescribed_family
from darkroom_server.engine.families.z_image import ZImage

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        Flux,
        FluxKontext,
        StableDiffusion3,
        Chroma,
        AuraFlow,
        PixArtSigma,
        PixArtAlpha,
        ZImage,
        QwenImage,
        QwenImageEdit,
        QwenImageEditPlus,
        Flux2,
        Flux2Klein,
        Lumina2,
        Sana,
        SanaSprint,
        HunyuanImage,
        StableDiffusionInpaint,
        StableDiffusionXLInpaint,
        Kolors,
        HiDream,
        # One line for each family.
    )
}
"""By the class of the pipeline, as ``model_index.json`` names it."""

SINGLE_FILE: type[Family] = StableDiffusion
"""The family of a single file that comes without ``--model-config``, if no key names another."""


def family_named(kind: str, index: Mapping[str, Any], name: str) -> type[Family]:
    """The family of a pipeline of class ``kind`` with the components of ``index``.

    ``name`` is what the operator calls the model. Raises ``StartupError`` if it cannot be served.
    """
    if lacking := _lacking_packages(kind):
        raise StartupError(
            f"model {name!r} is a {kind}, which needs the package {' and '.join(lacking)}; "
            "install it"
        )
    return FAMILIES.get(kind) or undescribed_family(kind, index, name)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that was loaded. Raises ``StartupError`` as ``family_named``."""
    kind = type(pipeline).__name__
    return family_named(kind, pipeline.config, kind)(pipeline)


def _lacking_packages(kind: str) -> list[str]:
    """The packages that are not installed, and without which diffusers does not load ``kind``."""
    found = getattr(diffusers, kind, None)
    if not isinstance(found, diffusers.utils.DummyObject):
        return []
    # It names all that the class needs; Darkroom requires these two itself.
    return [package for package in found._backends if package not in ("torch", "transformers")]
