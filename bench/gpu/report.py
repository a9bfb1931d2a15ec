"""The GPU's section of ``docs/benchmarks.md``."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.engine.report import NAMES
from bench.report.goals import Goal
from bench.report.markdown import cell, goals_table, join, provenance, table
from bench.report.results import Results
from bench.report.statistics import quantile

COMMAND = "make bench-gpu"

LONG_STEPS = "50"
"""Steps of the images that the goals are about."""

ENGINE, PRESET = "engine ", "preset "
"""How the names of the phases begin that measure an engine, or compare images, of one preset."""

IMAGE_STEP_TFLOP = 1.58
"""Operations of one step of one image with guidance (two rows), in 10¹²."""

GB = 1e9


def goals(results: Results) -> list[Goal]:
    """The goals of what was measured, with what was reached by the better preset."""
    engines = _of_presets(results, ENGINE)
    lone = {
        preset: figures["lone"][LONG_STEPS]["seconds"]
        for preset, figures in engines.items()
        if LONG_STEPS in figures.get("lone", {})
    }
    rates = {
        preset: figures["saturated"]["images_per_second"]
        for preset, figures in engines.items()
        if "saturated" in figures
    }
    found = []
    if lone:
        best = min(lone, key=lone.__getitem__)
        name = f"a lone image of {LONG_STEPS} steps, seconds, preset `{best}`"
        found.append(Goal(name, lone[best], 0.45, False))
    if rates:
        best = max(rates, key=rates.__getitem__)
        name = f"images/s of {LONG_STEPS} steps, saturated, preset `{best}`"
        found.append(Goal(name, rates[best], 4.7, True))
    if tails := results.figures.get("load", {}).get("latencies"):
        ratio = quantile(tails["engine"], 0.95) / quantile(tails["static"], 0.95)
        found.append(Goal("p95 at 70 % load over static batches'", ratio, 0.5, False))
    return found


def section(results: Results) -> str:
    """The Markdown."""
    figures, reached = results.figures, goals(results)
    ceiling = figures.get("machine", {}).get("matmul_tflops")
    steps = [
        step for name in ("forms", "compiled") for step in figures.get(name, {}).get("steps", ())
    ]
    return join(
        [
            "## Stable Diffusion 1.4 on a GPU",
            provenance(results, COMMAND),
            "The real architecture with random weights, 512×512, float16.",
            results.note,
            goals_table("", reached) if reached else "",
            _not_done(figures["phases"]),
            _ceilings(figures.get("machine", {})),
            _schedulers(_of_presets(results, PRESET)),
            _families(figures.get("families", {}).get("families", {})),
            _steps(steps, ceiling) if steps else "",
            _others(figures.get("decodes", {})),
            _engines(_of_presets(results, ENGINE), ceiling),
            _faults(figures),
            _load(figures.get("load", {})),
        ]
    )


def limit_fraction(rows: int, seconds: float, tflops: float) -> float:
    """The share, 0 to 1, of the rate ``tflops`` that a forward pass of ``rows`` reaches."""
    return rows / 2 * IMAGE_STEP_TFLOP / tflops / seconds


def _of_presets(results: Results, phase: str) -> dict[str, dict[str, Any]]:
    return {
        name.removeprefix(phase): figures
        for name, figures in results.figures.items()
        if name.startswith(phase)
    }


def _not_done(phases: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name, note["outcome"], cell(note["why"])]
        for name, note in phases.items()
        if note["outcome"] != "done"
    ]
    return f"Not measured:\n\n{table(['', '', 'why'], rows)}" if rows else ""


def _ceilings(machine: Mapping[str, Any]) -> str:
    names = {
        "matmul_tflops": "product of two matrices of 8192×8192 in float16, TFLOP/s",
        "device_copy_gb_per_second": "copy on the device, GB/s read and written",
        "host_to_device_gb_per_second": "copy from pinned memory to the device, GB/s",
        "launch_microseconds": "launch of a kernel from Python, µs",
    }
    rows = [[text, f"{machine[key]:.1f}"] for key, text in names.items() if key in machine]
    return f"### Ceilings\n\n{table(['', 'measured'], rows)}" if rows else ""


def _schedulers(presets: Mapping[str, Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for figures in presets.values() for name in figures["jobs"])
    rows = [
        [f"`{name}`", *(_off(figures["jobs"].get(name)) for figures in presets.values())]
        for name in names
    ]
    if not rows:
        return ""
    return (
        "### The same images as on a CPU\n\nThe demo model, each scheduler. The mean difference of "
        "an image from that of a CPU in float32 / from the same image alone on this device, as a "
        "part of the difference of two images of different requests.\n\n"
        f"{table(['', *(f'`{preset}`' for preset in presets)], rows)}"
    )


def _families(families: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, figures in families.items():
        jobs = list(figures.get("jobs", {}).values())
        worst = {
            kind: max((job[kind] for job in jobs if job[kind] is not None), default=None)
            for kind in ("cpu", "alone")
        }
        rows.append([name, _off(worst if jobs else None), figures.get("half", "")])
    if not rows:
        return ""
    return (
        "A tiny model of each family with random weights: the same in float32, the worst of three "
        "images; and the type in which `fast` made images too.\n\n"
        f"{table(['', 'in float32', 'made in'], rows)}"
    )


def _off(job: Mapping[str, float | None] | None) -> str:
    if job is None:
        return "failed"
    cells = ("" if job[kind] is None else f"{job[kind]:.1%}" for kind in ("cpu", "alone"))
    return " / ".join(cells)


def _steps(steps: Sequence[Mapping[str, Any]], ceiling: float | None) -> str:
    found = {(step["form"], step["rows"]): step["seconds"] for step in steps}
    rows = sorted({step["rows"] for step in steps})

    def cell(form: str, count: int) -> str:
        seconds = found.get((form, count))
        if seconds is None:
            return ""
        share = f" ({limit_fraction(count, seconds, ceiling):.0%})" if ceiling else ""
        return f"{seconds * 1e3:.1f}{share}"

    lines = [
        [form, *(cell(form, count) for count in rows)]
        for form in dict.fromkeys(step["form"] for step in steps)
    ]
    limit = (
        f"; in brackets the share of {ceiling:.0f} TFLOP/s, of which the two rows of an image take "
        f"{IMAGE_STEP_TFLOP:g} TFLOP"
        if ceiling
        else ""
    )
    return (
        f"### One forward pass\n\nMilliseconds, by rows{limit}. Empty: did not fit in memory, or "
        f"not measured.\n\n{table(['', *(f'{count} rows' for count in rows)], lines)}"
    )


def _others(figures: Mapping[str, Any]) -> str:
    lines = [
        [f"decode {each['images']} at once", f"{each['seconds'] * 1e3:.1f}"]
        for each in figures.get("decode", ())
    ]
    lines += [
        [f"encode {each['prompts']} prompts", f"{each['seconds'] * 1e3:.1f}"]
        for each in figures.get("encode", ())
    ]
    return f"### Encode and decode\n\n{table(['', 'ms'], lines)}" if lines else ""


def _engines(presets: Mapping[str, Mapping[str, Any]], ceiling: float | None) -> str:
    rows = []
    for preset, figures in presets.items():
        lone, saturated = figures.get("lone", {}), figures.get("saturated", {})
        rate = saturated.get("images_per_second")
        share = f" ({rate * int(LONG_STEPS) * IMAGE_STEP_TFLOP / ceiling:.0%})" if ceiling else ""
        peak = figures.get("peak_bytes")
        rows.append(
            [
                f"`{preset}`",
                figures["denoiser"],
                f"{figures['start_seconds']:.1f}",
                *(
                    f"{lone[steps]['seconds']:.3f}" if steps in lone else ""
                    for steps in ("20", LONG_STEPS)
                ),
                "" if rate is None else f"{rate:.2f}{share if rate else ''}",
                "" if peak is None else f"{peak / GB:.1f}",
            ]
        )
    if not rows:
        return ""
    heads = ["", "denoiser", "start, s", "20 steps, s", "50 steps, s", "images/s", "peak, GB"]
    return (
        "### The engine\n\nSeconds of a lone image at the median, without the first; images/s of "
        "50 steps with 16 callers, in brackets the share of the ceiling of products, decodes not "
        f"counted.\n\n{table(heads, rows)}"
    )


def _faults(figures: Mapping[str, Any]) -> str:
    parts = []
    if found := figures.get("out of memory"):
        parts.append(
            f"With the device's memory full, a job is answered with `{found['job']}`. A load fails "
            f"as out of memory: {_yes(found['load'])}. The next image has the same bytes as "
            f"before: {_yes(found['same_image_after'])}. The model is loaded once there is memory: "
            f"{_yes(found['loaded_after'])}."
        )
    if found := figures.get("device assert"):
        parts.append(
            "A kernel fails an assertion: the engine's process dies, another one starts and makes "
            f"the image after {found['seconds']:.1f} s, with the same bytes as before: "
            f"{_yes(found['same_image_after'])}."
        )
    return join(["### Faults", *parts]) if parts else ""


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "**no**"


def _load(load: Mapping[str, Any]) -> str:
    lone = [
        [
            f"{steps} steps",
            *(f"{quantile([p[name] for p in pairs], 0.5):.3f}" for name in ("engine", "pipe")),
            f"{quantile([p['engine'] / p['pipe'] for p in pairs], 0.5):.3f}",
        ]
        for steps, pairs in load.get("lone", {}).items()
    ]
    tails, rates = load.get("latencies", {}), load.get("images_per_second", {})
    rows = [
        [
            NAMES[name],
            f"{rates[name]:.2f}",
            *(f"{quantile(seconds, share):.2f}" for share in (0.5, 0.95)),
        ]
        for name, seconds in tails.items()
    ]
    heads = ["", "Darkroom's engine, s", "bare `pipe()`, s", "ratio"]
    return join(
        [
            f"### Beside `pipe()`\n\nA lone image, preset `fast`: medians of interleaved pairs."
            f"\n\n{table(heads, lone)}"
            if lone
            else "",
            f"Images/s of the mixed load with 8 callers; latencies in seconds at "
            f"{load['load']:.0%} of the capacity of (b), Poisson arrivals.\n\n"
            f"{table(['', 'images/s', 'p50', 'p95'], rows)}"
            if rows
            else "",
        ]
    )
