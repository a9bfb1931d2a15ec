"""Measures the engine beside diffusers' pipelines of SDXL and FLUX.1.

``python -m bench.engine.families``: tiny models of both architectures, three sizes of each.
``python -m bench.engine`` runs it too.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.engine.report import NAMES
from bench.engine.tiny_models import MODELS, TinyModel
from bench.inprocess.engine import make_engine
from bench.inprocess.pipelines import make_pipelines
from bench.inprocess.remote import MAX_BATCH_IMAGES, Remote
from bench.report.benchmark import Amount, Benchmark, Measurement, run_named
from bench.report.goals import Goal, throughput_goals
from bench.report.markdown import goals_table, layout_words, table
from bench.report.results import Results, Run
from bench.report.statistics import bootstrap_median
from bench.workload.requests import STEPS, mixed
from darkroom_server.core.engine_config import EngineConfig, ModelSource

CALLERS = 8


def compare(
    tiny: TinyModel, folder: Path, requests: int, rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of one model, and how it ran: the same closed loops for each peer, in turns."""
    torch.manual_seed(0)
    tiny.write(folder)
    source = ModelSource(id=tiny.name, location=str(folder))
    config = EngineConfig(models=(source,), rows=tiny.rows_per_image * MAX_BATCH_IMAGES)
    engine = Remote(partial(make_engine, config, tiny.options))
    if engine.info is None:
        raise RuntimeError("the engine reported no model")
    runtime = engine.info.runtime
    pipelines = partial(make_pipelines, str(folder), runtime)
    peers = {
        "serial": Remote(partial(pipelines, 1, tiny.options)),
        "static": Remote(partial(pipelines, MAX_BATCH_IMAGES, tiny.options)),
        "engine": engine,
    }
    for peer in peers.values():
        peer.warm_up()
    images_per_second: dict[str, list[float]] = {name: [] for name in peers}
    batches: list[tuple[int, float]] = []
    for round in range(rounds):
        wanted = mixed(requests, seed=round)
        names = list(peers)[round % len(peers) :] + list(peers)[: round % len(peers)]
        for name in names:
            report = peers[name].serve(wanted, callers=CALLERS)
            run = Run(
                scenario="closed",
                peer=name,
                round=round,
                nominal_before=0.0,
                nominal_after=0.0,
                answers=report.answers,
            )
            images_per_second[name].append(run.images_while_busy / run.busy_seconds)
            batches += report.batch_times
        last = {name: found[-1] for name, found in images_per_second.items()}
        print(tiny.name, tiny.latents, *(f"{n} {v:.2f}/s" for n, v in last.items()), flush=True)
    for peer in peers.values():
        peer.close()
    busy = sum(seconds for _, seconds in batches)
    figures = {
        "family": tiny.name,
        "weights": denoiser_weights(folder),
        "latents": tiny.latents,
        "requests": requests,
        "images_per_second": images_per_second,
        "images_a_batch": sum(rows * s for rows, s in batches) / busy / tiny.rows_per_image,
    }
    return figures, asdict(runtime)


def denoiser_weights(folder: Path) -> int:
    """The number of weights of the denoiser in ``folder``."""
    (file,) = [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]
    with safe_open(file, "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


def measure(options: argparse.Namespace) -> Measurement:
    """Every model, one after another."""
    found, runtimes = [], {}
    for place, tiny in enumerate(MODELS):
        first = place == 0 or MODELS[place - 1].name != tiny.name
        with tempfile.TemporaryDirectory() as folder:
            figures, runtime = compare(
                tiny,
                Path(folder),
                options.requests if first else options.requests_of_larger,
                options.rounds,
            )
        found.append(figures)
        runtimes[tiny.name] = runtime
    return Measurement(
        figures={"models": found},
        model={"runtimes": runtimes},
        settings={"callers": CALLERS, "max_batch_images": MAX_BATCH_IMAGES},
    )


def goals(results: Results) -> list[Goal]:
    """The goals of the smallest model of each family: medians of the rounds, with intervals."""
    smallest: dict[str, Mapping[str, Any]] = {}
    for each in results.figures["models"]:
        smallest.setdefault(each["family"], each)
    found = []
    for family, figures in smallest.items():
        bounds = {goal.name: goal for goal in throughput_goals(dict.fromkeys(NAMES, 1.0))}
        for other, (name, goal) in zip(("serial", "static"), bounds.items(), strict=True):
            ratio = bootstrap_median(_ratios(figures, other))
            found.append(
                Goal(
                    f"{family}: {name}",
                    ratio.value,
                    goal.bound,
                    goal.at_least,
                    between=(ratio.low, ratio.high),
                )
            )
    return found


def describe(results: Results) -> list[str]:
    """The method, the goals and a row for each model."""
    settings, runtimes = results.settings, results.model["runtimes"]
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    formats = "; ".join(
        f"{family} in {runtime['dtype']}{layout_words(runtime)}"
        for family, runtime in runtimes.items()
    )
    return [
        "The architectures of SDXL (a UNet, two rows for each image) and of FLUX.1 dev (a "
        "transformer, one row and 32 text tokens for each image), with random weights; "
        "`bench/engine/tiny_models.py` fixes their sizes. The same three peers as above, each in "
        f"a process of its own: {formats}. At most {settings['max_batch_images']} images share a "
        f"batch or a call. A closed loop of {settings['callers']} callers: {shares}; guidance 4 "
        "or 7.5. The three get the same requests and take turns in changing order, "
        f"{settings['rounds']} rounds. Ratios are taken within a round: the median, and its 95 % "
        "bootstrap interval in brackets.",
        goals_table("ratio, 10 million weights, 16×16 latents", goals(results), "×"),
        table(
            [
                "",
                "weights, millions",
                "latents",
                *("(a) images/s", "(b) images/s", "(c) images/s"),
                *("(c) / (a)", "(c) / (b)"),
                "images in a batch of (c)",
            ],
            [_row(figures) for figures in results.figures["models"]],
        ),
        "(a): " + NAMES["serial"][4:] + ". (b): " + NAMES["static"][4:] + ". (c): "
        "Darkroom's engine. Images in a batch: the mean, weighted by time.",
    ]


def _row(figures: Mapping[str, Any]) -> list[str]:
    rates = [bootstrap_median(figures["images_per_second"][name]).value for name in NAMES]
    ratios = [bootstrap_median(_ratios(figures, other)) for other in ("serial", "static")]
    return [
        figures["family"],
        f"{figures['weights'] / 1e6:.1f}",
        f"{figures['latents']}×{figures['latents']}",
        *(f"{rate:.2f}" for rate in rates),
        *(f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" for ratio in ratios),
        f"{figures['images_a_batch']:.1f}",
    ]


def _ratios(figures: Mapping[str, Any], other: str) -> list[float]:
    """The engine's images/s over those of ``other``, in each round."""
    rates = figures["images_per_second"]
    return [ours / theirs for ours, theirs in zip(rates["engine"], rates[other], strict=True)]


BENCHMARK = Benchmark(
    name="families",
    title="SDXL and FLUX.1 beside their pipelines",
    command="python -m bench.engine.families",
    amounts={
        "requests": Amount(48, 9, "requests of each closed loop, smallest models"),
        "requests_of_larger": Amount(24, 9, "the same of the larger models"),
        "rounds": Amount(5, 1, "of each model, at least 3 for an interval"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
    check=lambda options: (
        ""
        if min(options.requests, options.requests_of_larger) > CALLERS
        else f"requests must be more than the {CALLERS} callers"
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the section."""
    given = sys.argv[1:] if arguments is None else arguments
    run_named((BENCHMARK,), "bench.engine.families", __doc__, [BENCHMARK.name, *given])


if __name__ == "__main__":
    main()
