"""``docs/benchmarks.md``, the part on memory and speed of Stable Diffusion 1.4's architecture."""

from collections.abc import Mapping
from typing import Any

from bench.goals import Goal
from bench.results import Results
from bench.sections import table

CLAIMS = {
    "autocast over float32": "about 2× the speed of float32",
    "float16, sliced": "about 10 % slower than float16",
    "preset frugal": "Stable Diffusion in 3.2 GB",
}
"""What "Memory and speed" of diffusers 0.3.0 says (2022, with the attention of its day)."""

GB = 1e9

FLOOR = 2.36 * 2**30
"""Bytes of the float16 weights and the least activations of one image, all on the device."""


def goals(costs: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """The bounds of the presets' peaks in GB by the allocator, and of ``fast``'s speed."""
    frugal, fast, tiny = (costs[f"preset {name}"] for name in ("frugal", "fast", "tiny"))
    return [
        Goal("frugal's peak, GB", frugal["allocated"] / GB, 3.2, False),
        Goal("fast's peak, GB", fast["allocated"] / GB, 2.7, False),
        Goal("fast's speed over frugal's", frugal["seconds"] / fast["seconds"], 1.3, True),
        Goal("tiny's peak, GB", tiny["allocated"] / GB, 1.7, False),
    ]


def page(results: Results) -> str:
    """The section."""
    costs = {cost["setting"]: cost for cost in results.figures["costs"]}
    plain = costs["float32"]["seconds"]
    rows = [
        [
            name,
            f"{cost['seconds']:.2f}",
            f"{plain / cost['seconds']:.2f}×",
            *(f"{cost[kind] / GB:.2f}" for kind in ("allocated", "reserved", "device")),
            f"{cost['allocated'] / FLOOR:.2f}×",
            CLAIMS.get(name, ""),
        ]
        for name, cost in costs.items()
    ]
    heads = [
        "setting",
        "seconds",
        "speed",
        "peak, GB",
        "reserved, GB",
        "device, GB",
        "over floor",
        "claim",
    ]
    reached = [
        [
            goal.name,
            f"{'≥' if goal.at_least else '≤'} {goal.bound:g}",
            f"{goal.reached:.2f}",
            "yes" if goal.met else "**no**",
        ]
        for goal in goals(costs)
    ]
    packages = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    note = f"\n\n{results.note}" if results.note else ""
    return (
        "## Memory and speed of Stable Diffusion 1.4\n\n"
        f"{results.date}, {results.machine.text}; {packages}. The real architecture with random "
        f"weights, 512×512, {results.settings['steps']} steps, guidance 7.5, one image, median of "
        f"{results.settings['images']}. A GB is 10⁹ bytes. The peak is the allocator's while "
        'drawing, weights included; "reserved" is what it kept from the driver; "device" is '
        "what the driver counts as in use, CUDA's context included. The floor of the peak is "
        f"{FLOOR / 2**30:.2f} GiB, float16 weights and one image. The claims are those of "
        '"Memory and speed" in the documentation of diffusers 0.3.0. Made by '
        f"`python -m bench.memory`.{note}\n\n"
        f"{table(heads, rows)}\n\n{table(['', 'goal', 'reached', 'met'], reached)}"
    )
