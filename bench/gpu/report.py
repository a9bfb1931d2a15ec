"""The GPU's section of ``docs/benchmarks.md``."""

from collections.abc import Sequence
from typing import Any

from bench.engine.report import NAMES, images_per_second, pooled
from bench.report.goals import Goal, of_class
from bench.report.markdown import goals_table, join, provenance, table
from bench.report.results import Results
from bench.report.statistics import quantile

SATURATED_STEPS = 50
SATURATED = "closed 50 steps"
BUSY = "open 0.7"
LONE_STEPS = (20, 50)

IMAGE_STEP_SECONDS = 2.0e-3
"""Arithmetic of one step of one image with guidance (two rows), at 790 TFLOP/s."""

LIMIT_IMAGES_PER_SECOND = 9.5
"""Images of 50 steps at that rate."""


def goals(results: Results) -> list[Goal]:
    """Every goal, with what was reached."""
    rates = {name: images_per_second(runs) for name, runs in pooled(results, SATURATED).items()}
    tails = {name: _latency(results, name, 0.95) for name in NAMES}
    lone = quantile([pair["engine"] for pair in results.figures["lone"]["50"]], 0.5)
    ours = rates["engine"]
    return [
        Goal("a lone image of 50 steps, seconds", lone, 0.55, False),
        Goal("images/s of 50 steps, saturated", ours, 5.0, True),
        Goal("images/s over one call after another", ours / rates["serial"], 4.0, True),
        Goal(
            "p95 at 70 % load over static batches'", tails["engine"] / tails["static"], 0.5, False
        ),
    ]


def section(results: Results) -> str:
    """The Markdown."""
    return join(
        [
            "## Stable Diffusion 1.4 on a GPU",
            provenance(results, "make bench-gpu"),
            "The real architecture with random weights, 512×512, float16.",
            results.note,
            goals_table("", goals(results)),
            _steps(results.figures["steps"]),
            _others(results.figures),
            _lone(results),
            _load(results),
        ]
    )


def limit_fraction(rows: int, seconds: float) -> float:
    """The share of the arithmetic limit, 0 to 1, that a forward pass of ``rows`` reaches."""
    return rows / 2 * IMAGE_STEP_SECONDS / seconds


def _steps(steps: Sequence[dict[str, Any]]) -> str:
    found = {(step["form"], step["rows"]): step["seconds"] for step in steps}
    rows = sorted({step["rows"] for step in steps})
    lines = [
        [
            form,
            *(
                f"{found[form, count] * 1e3:.1f} ({limit_fraction(count, found[form, count]):.0%})"
                if (form, count) in found
                else ""
                for count in rows
            ),
        ]
        for form in dict.fromkeys(step["form"] for step in steps)
    ]
    return (
        "### One forward pass\n\nMilliseconds, by rows; in brackets the share of the limit of "
        f"{IMAGE_STEP_SECONDS * 1e3:g} ms of arithmetic for the two rows of an image. Empty: did "
        f"not fit in memory.\n\n{table(['', *(f'{count} rows' for count in rows)], lines)}"
    )


def _others(figures: dict[str, Any]) -> str:
    lines = [
        [f"decode {each['images']} at once", f"{each['seconds'] * 1e3:.1f}"]
        for each in figures["decode"]
    ]
    lines += [
        [f"encode {each['prompts']} prompts", f"{each['seconds'] * 1e3:.1f}"]
        for each in figures["encode"]
    ]
    return f"### Encode and decode\n\n{table(['', 'ms'], lines)}"


def _lone(results: Results) -> str:
    lines = [
        [
            f"{steps} steps",
            *(f"{quantile([p[name] for p in pairs], 0.5):.3f}" for name in ("engine", "pipe")),
            f"{quantile([p['engine'] / p['pipe'] for p in pairs], 0.5):.3f}",
        ]
        for steps, pairs in results.figures["lone"].items()
    ]
    heads = ["", "Darkroom's engine, s", "bare `pipe()`, s", "ratio"]
    return f"### A lone image\n\nMedians of interleaved pairs.\n\n{table(heads, lines)}"


def _load(results: Results) -> str:
    closed, settings = pooled(results, SATURATED), results.settings
    lines = []
    for name, label in NAMES.items():
        rate = images_per_second(closed[name])
        lines.append(
            [
                label,
                f"{rate:.2f}",
                f"{rate / LIMIT_IMAGES_PER_SECOND:.0%}",
                *(f"{_latency(results, name, share):.2f}" for share in (0.5, 0.95)),
            ]
        )
    heads = ["", f"images/s of {SATURATED_STEPS} steps", "of the limit", "p50, s", "p95, s"]
    return (
        f"### Under load\n\nImages/s with {2 * settings['callers']} callers that request "
        f"{SATURATED_STEPS} steps, and its share of the limit of {LIMIT_IMAGES_PER_SECOND:g}; "
        f"latencies of the mixed load at {settings['load']:.0%} of the capacity of (b), Poisson "
        f"arrivals.\n\n{table(heads, lines)}"
    )


def _latency(results: Results, name: str, share: float) -> float:
    answers = [each for run in pooled(results, BUSY)[name] for each in run.answers]
    return quantile(of_class(answers, None), share)
