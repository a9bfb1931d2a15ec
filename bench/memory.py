"""Seconds and peak VRAM of Stable Diffusion 1.4's architecture: ``python -m bench.memory``.

512×512, 50 steps, guidance 7.5, one image; each setting in a process of its own. Needs CUDA.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.arrivals import Arrivals
from bench.machine import this_machine, versions
from bench.memory_page import page
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sd14 import cached_sd14
from bench.sections import DOCS, write_section
from bench.threaded import EngineContender
from bench.workload import Request
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
    max_rows=2,
)
SETTINGS: dict[str, EngineConfig] = {
    "float32": replace(PLAIN, dtype=Dtype.FLOAT32),
    "autocast over float32": replace(PLAIN, dtype=Dtype.FLOAT32, autocast=True),
    "float16": PLAIN,
    "float16 and autocast": replace(PLAIN, autocast=True),
    "float16, sliced": replace(PLAIN, attention=Attention.SLICED, slice_size="auto"),
    **{
        f"preset {preset}": EngineConfig(models=(), device="cuda", preset=preset, max_rows=2)
        for preset in (Preset.FRUGAL, Preset.FAST, Preset.TINY)
    },
}
"""What is compared, by the name it has in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One setting: seconds an image at the median, and memory in bytes.

    ``allocated`` is the allocator's peak while drawing, weights included; ``reserved`` what it
    kept from the driver at most; ``device`` all that the driver counts as in use on the device,
    CUDA's own context included.
    """

    setting: str
    seconds: float
    allocated: int
    reserved: int
    device: int


def measure(setting: str, folder: str, images: int) -> tuple[Cost, dict[str, object]]:
    """Draw ``images`` and one to warm up, in this process."""
    # The engine's own measurements would reset the peak in the middle of an image.
    INTERVAL_SECONDS["cuda"] = math.inf
    config = replace(SETTINGS[setting], models=(ModelSource(id="sd14", location=folder),))
    contender = EngineContender(ThreadEngine(config))
    contender.draw(Arrivals([REQUEST]))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(images):
        began = time.perf_counter()
        contender.draw(Arrivals([REQUEST]))
        seconds.append(time.perf_counter() - began)
    free, total = torch.cuda.mem_get_info()
    cost = Cost(
        setting=setting,
        seconds=statistics.median(seconds),
        allocated=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
        device=total - free,
    )
    facts = model_facts(contender.info)
    contender.close()
    return cost, facts


def measure_apart(setting: str, folder: str, images: int) -> tuple[Cost, dict[str, object]]:
    """``measure`` in a fresh process, so that the driver's figure is this setting's alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, setting, folder, images).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every setting, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__)
    parser.add_argument("--images", type=int, default=3, help="drawn with each setting")
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-memory needs a CUDA device; there is none", file=sys.stderr)
        sys.exit(2)
    gpu = torch.cuda.get_device_name()
    folder = str(cached_sd14())
    costs, facts = [], {}
    for setting in SETTINGS:
        cost, facts[setting] = measure_apart(setting, folder, options.images)
        costs.append(cost)
        print(f"{setting}: {cost.seconds:.2f} s, {cost.allocated / 1e9:.2f} GB", flush=True)
    results = Results(
        bench="memory",
        date=today(),
        machine=this_machine(gpu),
        versions=versions(),
        model=facts,
        settings={"steps": STEPS, "images": options.images},
        figures={"costs": [asdict(cost) for cost in costs]},
        note=options.note,
    )
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "memory", page(results), options.docs)


if __name__ == "__main__":
    main()
