"""Stable Diffusion 1.4's architecture on a GPU, from one pass to load: ``python -m bench.gpu``.

512×512, float16, random weights. Needs CUDA. Ends with ``bench.memory``, which writes its own
section.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.contender import WIDEST
from bench.denoise import FORMS, ROWS, decode_seconds, encode_seconds, pass_seconds
from bench.engine import CALLERS, Bench
from bench.gpu_page import BUSY, LONE_STEPS, SATURATED, SATURATED_STEPS, goals, page
from bench.machine import this_machine, versions
from bench.pipelines import load_pipeline
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sd14 import cached_sd14
from bench.sections import DOCS, write_section
from bench.workload import mixed, poisson, uniform
from darkroom_server.core.engine_config import Attention, Preset
from darkroom_server.core.model import ModelRuntime

DECODES = (1, 2, 4, 8)
LOAD = 0.7
"""Of what static batches can do."""


def step_times(form: str, folder: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """One form of the UNet, in this process."""
    run = FORMS[form](_loaded(folder).unet)
    found = pass_seconds(run, rows)
    return [{"form": form, "rows": count, "seconds": s} for count, s in found.items()]


def other_times(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Decodes by their images, and one prompt with its empty counterpart."""
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


def load_runs(folder: str, options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Lone images, saturation by long requests, and a mixed load, beside ``pipe()``."""
    bench = Bench(folder, Preset.FAST)
    lone = {str(steps): bench.lone(options.pairs, steps) for steps in LONE_STEPS}
    for round in range(options.rounds):
        alike = uniform(mixed(options.closed, options.seed + round), SATURATED_STEPS, 7.5)
        bench.compete(SATURATED, round, alike, callers=2 * CALLERS)
        bench.compete("closed", round, mixed(options.closed, options.seed + round), callers=CALLERS)
    static = [r for r in bench.runs if (r.scenario, r.contender) == ("closed", "static")]
    rate = LOAD * sum(r.drawn_while_busy for r in static) / sum(r.busy_seconds for r in static)
    for round in range(options.rounds):
        seed = options.seed + 100 + round
        requests = poisson(mixed(options.arrivals, seed), rate, seed)
        bench.compete(BUSY, round, requests, rate=rate)
    bench.close()
    return bench, lone


def measure(options: argparse.Namespace) -> Results:
    """Everything but the memory."""
    folder = str(cached_sd14())
    steps: list[dict[str, Any]] = []
    for form in options.forms:
        found = apart(step_times, form, folder, options.rows)
        print(f"{form}:", *(f"{s['rows']} rows {s['seconds'] * 1e3:.1f} ms" for s in found))
        steps += found
    others = apart(other_times, folder)
    bench, lone = load_runs(folder, options)
    return Results(
        bench="gpu",
        date=today(),
        machine=this_machine(torch.cuda.get_device_name()),
        versions=versions(),
        model=model_facts(replace(bench.info, id="sd14")),
        settings={"widest": WIDEST, "callers": CALLERS, "load": LOAD, "rounds": options.rounds},
        figures={"steps": steps, "lone": lone, "passes": bench.pass_medians(), **others},
        runs=bench.runs,
        note=options.note,
    )


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in a fresh process, so that nothing of it stays on the device."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of a pass")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--arrivals", type=int, default=300, help="of the open loop and round")
    parser.add_argument("--closed", type=int, default=96, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, default=10, help="lone requests of each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device; there is none", file=sys.stderr)
        sys.exit(2)
    results = measure(options)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "gpu", page(results), options.docs)
    for goal in goals(results):
        print(f"{'met' if goal.met else 'MISSED':7}{goal.name}: {goal.reached:.3f}")
    memory.main(["--results", str(options.results), "--docs", str(options.docs)])


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
        fp8_storage=False,
        safety_checker=False,
    )
    return load_pipeline(folder, runtime)


if __name__ == "__main__":
    main()
