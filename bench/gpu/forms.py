"""Seconds of forward passes by form and rows, and of decodes and prompts."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.gpu.forward import COMPILED, FORMS, decode_seconds, encode_seconds, pass_seconds
from bench.gpu.phases import Figures, Plan
from bench.inprocess.pipelines import load_pipeline
from darkroom_server.core.engine_config import Attention, Preset
from darkroom_server.core.model_runtime import ModelRuntime

DECODES = (1, 2, 4, 8)
COMPILED_ROWS = (16,)
"""Each number takes a minute to compile."""


def weights(plan: Plan) -> Iterator[Figures]:
    """Write the weights of Stable Diffusion 1.4, unless the cache has them."""
    plan.sd14_source()
    yield {"written": True}


def forms(plan: Plan) -> Iterator[Figures]:
    """Forward passes in every form but the compiled one."""
    names = [name for name in plan.forms or FORMS if name != COMPILED]
    return _passes(plan, names, plan.rows)


def compiled(plan: Plan) -> Iterator[Figures]:
    """Forward passes of the compiled UNet."""
    return _passes(plan, [COMPILED], COMPILED_ROWS)


def decodes(plan: Plan) -> Iterator[Figures]:
    """Decodes by their images, and a prompt with its empty counterpart."""
    pipeline = _loaded(plan)
    vae, config = pipeline.vae, pipeline.unet.config
    latents = torch.randn(
        (max(DECODES), config.in_channels, config.sample_size, config.sample_size),
        device=vae.device,
        dtype=vae.dtype,
    )
    found: list[Figures] = []
    for images in DECODES:
        seconds = decode_seconds(vae, latents[:images], plan.repeats)
        found.append({"images": images, "seconds": seconds})
        yield {"decode": found}
    seconds = encode_seconds(pipeline.text_encoder, 2, plan.repeats)
    yield {"encode": [{"prompts": 2, "seconds": seconds}]}


def _passes(plan: Plan, names: Sequence[str], rows: Sequence[int]) -> Iterator[Figures]:
    unet = _loaded(plan).unet
    found: list[Figures] = []
    for name in names:
        # A form changes the UNet.
        run = FORMS[name](copy.deepcopy(unet))
        seconds = pass_seconds(run, rows, plan.repeats)
        found += [{"form": name, "rows": count, "seconds": s} for count, s in seconds.items()]
        yield {"steps": found}
        del run
        if plan.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def _loaded(plan: Plan) -> Any:
    cuda = plan.torch_device.type == "cuda"
    runtime = ModelRuntime(
        device=plan.device,
        dtype="float16" if cuda else "float32",
        preset=Preset.FAST,
        attention=Attention.SDPA,
        slice_size="",
        autocast=False,
        vae_tiling=False,
        channels_last=False,
        vae_channels_last=False,
        fp8_storage=False,
        safety_checker=False,
    )
    return load_pipeline(plan.sd14_source().location, runtime)
