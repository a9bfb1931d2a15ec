"""Measures Stable Diffusion 1.4's architecture on a GPU: ``python -m bench.gpu``.

512×512, float16, random weights: forward passes, decodes and load, then the memory of each preset
(``python -m bench.micro memory``). Needs CUDA. Writes results and sections of
``docs/benchmarks.md``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.engine.comparison import CALLERS, Comparison
from bench.gpu.forward import FORMS, ROWS, decode_seconds, encode_seconds, pass_seconds
from bench.gpu.report import BUSY, LONE_STEPS, SATURATED, SATURATED_STEPS, goals, section
from bench.gpu.sd14 import cached_sd14
from bench.inprocess.pipelines import load_pipeline
from bench.inprocess.remote import MAX_BATCH_IMAGES, in_fresh_process
from bench.micro.__main__ import main as micro
from bench.report.benchmark import add_output_options
from bench.report.goals import print_goals
from bench.report.machine import this_machine, versions
from bench.report.markdown import write_section
from bench.report.results import Results, model_facts, save, today
from bench.workload.requests import mixed, poisson, uniform
from darkroom_server.core.engine_config import Attention, Preset
from darkroom_server.core.model_runtime import ModelRuntime

DECODES = (1, 2, 4, 8)
LOAD = 0.7
"""Share of the capacity of static batches."""


def step_times(form: str, folder: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Times of one form of the UNet, in this process."""
    run = FORMS[form](_loaded(folder).unet)
    found = pass_seconds(run, rows)
    return [{"form": form, "rows": count, "seconds": s} for count, s in found.items()]


def other_times(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Times of decodes by their images, and of a prompt with its empty counterpart."""
    pipeline = _loaded(folder)
    vae, config = pipeline.vae, pipeline.unet.config
    latents = torch.randn(
        (max(DECODES), config.in_channels, config.sample_size, config.sample_size),
        device=vae.device,
        dtype=vae.dtype,
    )
    return {
        "decode": [
            {"images": images, "seconds": decode_seconds(vae, latents[:images])}
            for images in DECODES
        ],
        "encode": [{"prompts": 2, "seconds": encode_seconds(pipeline.text_encoder, 2)}],
    }


def load_runs(folder: str, options: argparse.Namespace) -> tuple[Comparison, dict[str, Any]]:
    """Lone images, saturation by long requests, and a mixed load, beside ``pipe()``."""
    peers = Comparison(folder, Preset.FAST)
    lone = {str(steps): peers.lone(options.pairs, steps) for steps in LONE_STEPS}
    for round in range(options.rounds):
        alike = uniform(mixed(options.closed, options.seed + round), SATURATED_STEPS, 7.5)
        peers.compete(SATURATED, round, alike, callers=2 * CALLERS)
        peers.compete("closed", round, mixed(options.closed, options.seed + round), callers=CALLERS)
    rate = LOAD * peers.capacity("static")
    for round in range(options.rounds):
        seed = options.seed + 100 + round
        requests = poisson(mixed(options.arrivals, seed), rate, seed)
        peers.compete(BUSY, round, requests, rate=rate)
    peers.close()
    return peers, lone


def measure(options: argparse.Namespace) -> Results:
    """Everything but the memory."""
    folder = str(cached_sd14())
    steps: list[dict[str, Any]] = []
    for form in options.forms:
        found = in_fresh_process(step_times, form, folder, options.rows)
        print(f"{form}:", *(f"{s['rows']} rows {s['seconds'] * 1e3:.1f} ms" for s in found))
        steps += found
    others = in_fresh_process(other_times, folder)
    peers, lone = load_runs(folder, options)
    return Results(
        bench="gpu",
        date=today(),
        machine=this_machine(torch.cuda.get_device_name()),
        versions=versions(),
        model=model_facts(replace(peers.info, id="sd14")),
        settings={
            "max_batch_images": MAX_BATCH_IMAGES,
            "callers": CALLERS,
            "load": LOAD,
            "rounds": options.rounds,
        },
        figures={"steps": steps, "lone": lone, "passes": peers.batch_medians(), **others},
        runs=peers.runs,
        note=options.note,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the sections."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of a forward pass")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--arrivals", type=int, default=300, help="of the open loop and round")
    parser.add_argument("--closed", type=int, default=96, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, default=10, help="lone requests of each peer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device; there is none", file=sys.stderr)
        sys.exit(2)
    results = measure(options)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "gpu", section(results), options.docs)
    print_goals(goals(results))
    micro(["memory", "--results", str(options.results), "--docs", str(options.docs)])


def _loaded(folder: str) -> Any:
    cuda = torch.cuda.is_available()
    runtime = ModelRuntime(
        device="cuda" if cuda else "cpu",
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
    return load_pipeline(folder, runtime)


if __name__ == "__main__":
    main()
