"""Which memory layout of the VAE decodes faster on this CPU: contiguous or channels last."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from bench.gpu.sd14 import new_vae
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source
from bench.report.markdown import table
from bench.report.results import Results
from bench.report.statistics import bootstrap_median, quantile
from darkroom_server.core.engine_config import ModelSource, Preset
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup.formats import (
    Hardware,
    format_rule,
    vae_channels_last,
)
from darkroom_server.engine.warmup.presets import allowed_threads

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = (torch.bfloat16, torch.float32)
ROUNDS_PER_REAL = 5
"""Rounds of the demo model's VAE for each of the real one, which takes seconds."""

Decode = Callable[[], torch.Tensor]


def new_decoder(
    vae: AutoencoderKL, dtype: torch.dtype, layout: torch.memory_format, side: int
) -> Decode:
    """A decode of one image of random latents, ``side`` × ``side``; ``vae`` is changed."""
    vae.to(dtype=dtype).to(memory_format=layout)
    generator = torch.Generator().manual_seed(1)
    shape = (1, int(vae.config.latent_channels), side, side)
    latents = torch.randn(shape, generator=generator).to(dtype)
    return lambda: vae.decode(latents, return_dict=False)[0]


def in_turns(decoders: Mapping[str, Decode], rounds: int) -> list[dict[str, float]]:
    """Seconds of each of ``decoders`` in each round, the first of which is left out."""
    found = []
    for round in range(rounds + 1):
        names = list(decoders) if round % 2 else list(decoders)[::-1]
        seconds = {}
        for name in names:
            began = time.perf_counter()
            decoders[name]()
            seconds[name] = time.perf_counter() - began
        found.append(seconds)
    return found[1:]


def vaes(source: ModelSource) -> dict[str, tuple[Callable[[], AutoencoderKL], int, int]]:
    """By name: what makes the VAE, the sides of its latents, and one of how many rounds it takes.

    The real one decodes an image of the demo model's size: 512² takes ten seconds and more.
    """
    demo = AutoencoderKL.from_pretrained(source.location, subfolder="vae")
    factor = 2 ** (len(demo.config.block_out_channels) - 1)
    return {
        "of the model": (
            lambda: AutoencoderKL.from_pretrained(source.location, subfolder="vae"),
            int(demo.config.sample_size) // factor,
            1,
        ),
        "Stable Diffusion 1.4, 128×128": (new_vae, 16, ROUNDS_PER_REAL),
    }


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Measurement:
    """Both layouts in turns, for each VAE and each dtype."""
    source = model_source(options.model)
    torch.set_num_threads(allowed_threads())
    figures = []
    for name, (make, side, each) in vaes(source).items():
        for dtype in DTYPES:
            decoders = {
                layout: new_decoder(make().eval(), dtype, LAYOUTS[layout], side)
                for layout in LAYOUTS
            }
            rounds = in_turns(decoders, max(1, options.rounds // each))
            figures.append({"vae": name, "dtype": str(dtype)[6:], "rounds": rounds})
    hardware = Hardware.of(torch.device("cpu"))
    rule = format_rule(Preset.FAST, hardware, StableDiffusion.half)
    vae = vae_channels_last(Preset.FAST, hardware, rule.dtype, rule.channels_last)
    chosen: dict[str, Any] = {
        "dtype": str(rule.dtype)[6:],
        "layout": list(LAYOUTS)[rule.channels_last],
        "vae_layout": list(LAYOUTS)[vae],
        "reason": rule.reason,
    }
    return Measurement(figures={"decodes": figures, "chosen": chosen}, model={"id": source.id})


def describe(results: Results) -> Sequence[str]:
    """A text, and the times."""
    chosen = results.figures["chosen"]
    # Results from before the VAE had a rule of its own lack its layout.
    vae = f", and its VAE {own}" if (own := chosen.get("vae_layout")) else ""
    rows = []
    for each in results.figures["decodes"]:
        rounds = each["rounds"]
        ratio = bootstrap_median([r["channels last"] / r["contiguous"] for r in rounds])
        rows.append(
            [
                f"{each['vae']}, {each['dtype']}",
                *(f"{quantile([r[layout] for r in rounds], 0.5) * 1e3:.2f}" for layout in LAYOUTS),
                f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                str(len(rounds)),
            ]
        )
    return [
        "The VAE's layout follows from a rule of its own, and these figures are its reason. On "
        f"this machine the denoiser is {chosen['dtype']} and {chosen['layout']}{vae}: "
        f"{chosen['reason']}. Here a decode of one image of random latents runs in both layouts in "
        "turns: medians in ms, and the median ratio of a round with its 95 % interval.",
        table(["VAE", *LAYOUTS, "channels last / contiguous", "rounds"], rows),
    ]


BENCHMARK = Benchmark(
    name="vae_layout",
    title="The memory layout of the VAE",
    command="python -m bench.micro vae_layout",
    amounts={"rounds": Amount(60, 1, "decodes in each layout, in turns")},
    measure=measure,
    describe=describe,
)
