"""Checks of a checkpoint in a single file, before anything of it is loaded."""

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open

from darkroom_server.core.errors import StartupError

KINDS = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "chroma": "ChromaPipeline",
    "z-image-turbo": "ZImagePipeline",
}
"""The pipelines of the kinds of checkpoints that diffusers recognises by their keys."""

UNRECOGNISED = "v1"
"""What diffusers takes a checkpoint for that has no key of another kind."""

PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.", "text_encoders."),
}
"""How the keys of the parts besides the denoiser start."""


def read_shapes(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``file`` by their keys, without their data.

    Raises an error of safetensors if the file is damaged.
    """
    with safe_open(file, framework="pt") as opened:
        return {
            key: torch.empty(opened.get_slice(key).get_shape(), device="meta")
            for key in opened.keys()  # noqa: SIM118 - a file, not a dict.
        }


def pipeline_class_of(shapes: dict[str, torch.Tensor], name: str) -> str | None:
    """The class of pipeline that a checkpoint with ``shapes`` is of; None if no key says so.

    ``name`` is what the operator calls the model. Raises ``StartupError`` if it holds less than a
    pipeline, or a kind of model that is not served.
    """
    lacking = [
        part
        for part, starts in PARTS.items()
        if not any(key.startswith(start) for key in shapes for start in starts)
    ]
    if lacking:
        raise StartupError(
            f"model file {name!r} has no weights of a {' and of a '.join(lacking)}: give a file "
            "that holds the whole model, or a pipeline's folder"
        )
    kind = infer_diffusers_model_type(shapes)
    if kind == UNRECOGNISED:
        return None
    if kind not in KINDS:
        raise StartupError(
            f"model file {name!r} is a checkpoint of kind {kind!r}, which is not supported"
        )
    return KINDS[kind]
