"""Seconds and peak VRAM of Stable Diffusion 1.4's architecture, for each preset.

512×512, 50 steps, guidance 7.5, one image; each setting in a process of its own. Needs CUDA.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.inprocess.engine import EnginePeer
from bench.inprocess.remote import in_fresh_process
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results, model_facts
from bench.workload.arrivals import Arrivals
from bench.workload.requests import Request
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.engine.device.peak_memory import INTERVAL_SECONDS

STEPS = 50
REQUEST = Request(0, "a large yellow star on a blue background", STEPS, 7.5, seed=0)

PLAIN = EngineConfig(
    models=(),
    device="cuda",
    dtype=Dtype.FLOAT16,
    attention=Attention.SDPA,
    autocast=False,
    vae_tiling=False,
    channels_last=False,
    # One image: the warm-up must not claim memory for a batch.
    rows=2,
)
SETTINGS: dict[str, EngineConfig] = {
    "float32": replace(PLAIN, dtype=Dtype.FLOAT32),
    "autocast over float32": replace(PLAIN, dtype=Dtype.FLOAT32, autocast=True),
    "float16": PLAIN,
    "float16 and autocast": replace(PLAIN, autocast=True),
    "float16, sliced": replace(PLAIN, attention=Attention.SLICED, slice_size="auto"),
    **{
        f"preset {preset}": EngineConfig(models=(), device="cuda", preset=preset, rows=2)
        for preset in (Preset.FRUGAL, Preset.FAST, Preset.TINY)
    },
}
"""The engine's configurations, by the name in the table."""

CLAIMS = {
    "autocast over float32": "about 2× the speed of float32",
    "float16, sliced": "about 10 % slower than float16",
    "preset frugal": "Stable Diffusion in 3.2 GB",
}
"""What "Memory and speed" of diffusers 0.3.0 says (2022, with the attention of that time)."""

GB = 1e9

FLOOR = 2.36 * 2**30
"""Bytes of the float16 weights and the smallest activations of one image, all on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One setting: seconds an image at the median, and memory in bytes.

    ``allocated`` is the allocator's peak while generating, weights included; ``reserved`` the most
    that it reserved from the driver; ``device`` all that the driver counts as in use on the device,
    CUDA's context included.
    """

    setting: str
    seconds: float
    allocated: int
    reserved: int
    device: int


def measure_setting(setting: str, folder: str, images: int) -> tuple[Cost, dict[str, object]]:
    """Generate ``images`` after one to warm up, in this process."""
    # The engine's own measurements would reset the peak during an image.
    INTERVAL_SECONDS["cuda"] = math.inf
    config = replace(SETTINGS[setting], models=(ModelSource(id="sd14", location=folder),))
    peer = EnginePeer(ThreadEngine(config))
    peer.serve(Arrivals([REQUEST]))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(images):
        began = time.perf_counter()
        peer.serve(Arrivals([REQUEST]))
        seconds.append(time.perf_counter() - began)
    free, total = torch.cuda.mem_get_info()
    cost = Cost(
        setting=setting,
        seconds=statistics.median(seconds),
        allocated=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
        device=total - free,
    )
    facts = model_facts(peer.info)
    peer.close()
    return cost, facts


def settings_costs(folder: str, images: int) -> Iterator[tuple[Cost, dict[str, object]]]:
    """Each setting in a new process, so that the driver's figure belongs to it alone."""
    for setting in SETTINGS:
        cost, facts = in_fresh_process(measure_setting, setting, folder, images)
        print(f"{setting}: {cost.seconds:.2f} s, {cost.allocated / 1e9:.2f} GB", flush=True)
        yield cost, facts


def measure(options: argparse.Namespace) -> Measurement:
    """Every setting."""
    from bench.gpu.sd14 import cached_sd14  # It loads diffusers, which takes seconds.

    folder = str(cached_sd14(torch.device("cuda")))
    costs, facts = [], {}
    for cost, model in settings_costs(folder, options.images):
        costs.append(cost)
        facts[cost.setting] = model
    return Measurement(
        figures={"costs": [asdict(cost) for cost in costs]},
        model=facts,
        settings={"steps": STEPS},
        gpu=torch.cuda.get_device_name(),
    )


def check(options: argparse.Namespace) -> str:
    """Why it cannot run."""
    return "" if torch.cuda.is_available() else "needs a CUDA device; there is none"


def goals(results: Results) -> list[Goal]:
    """The bounds of the presets' peaks in GB by the allocator, and of ``fast``'s speed."""
    costs = _costs(results)
    frugal, fast, tiny = (costs[f"preset {name}"] for name in ("frugal", "fast", "tiny"))
    return [
        Goal("frugal's peak, GB", frugal["allocated"] / GB, 3.2, False),
        Goal("fast's peak, GB", fast["allocated"] / GB, 2.7, False),
        Goal("fast's speed over frugal's", frugal["seconds"] / fast["seconds"], 1.3, True),
        Goal("tiny's peak, GB", tiny["allocated"] / GB, 1.7, False),
    ]


def describe(results: Results) -> list[str]:
    """A text, the table of the settings, and the goals."""
    costs = _costs(results)
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
    heads = ["setting", "seconds", "speed", "peak, GB", "reserved, GB", "device, GB"]
    heads += ["over floor", "claim"]
    return [
        f"The real architecture with random weights, 512×512, {results.settings['steps']} steps, "
        f"guidance 7.5, one image, median of {results.settings['images']}. A GB is 10⁹ bytes. The "
        'peak is the allocator\'s while generating, weights included; "reserved" is what the '
        'allocator reserved from the driver; "device" is what the driver counts as in use, CUDA\'s '
        f"context included. The floor of the peak is {FLOOR / 2**30:.2f} GiB, float16 weights and "
        'one image. The claims are those of "Memory and speed" in the documentation of diffusers '
        "0.3.0.",
        table(heads, rows),
        goals_table("", goals(results)),
    ]


def _costs(results: Results) -> Mapping[str, Mapping[str, Any]]:
    return {cost["setting"]: cost for cost in results.figures["costs"]}


BENCHMARK = Benchmark(
    name="memory",
    title="Memory and speed of Stable Diffusion 1.4",
    command="python -m bench.micro memory",
    amounts={"images": Amount(3, 1, "images of each setting")},
    measure=measure,
    describe=describe,
    goals=goals,
    check=check,
)
