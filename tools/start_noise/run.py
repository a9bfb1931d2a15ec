"""The starts themselves: a quiet one, busy ones, and timed second ones."""

import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from darkroom_client import Client, DarkroomError, Model
from tools.observe.server import server

PROMPT = "a large yellow star on a blue background"
CALLERS = 48
"""Images in flight during the load: more rows than the largest row limit, so that it can move."""

IMPORTS = "import torch, diffusers, transformers"

LOAD = f"""
{IMPORTS}
from importlib.resources import files
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline
from darkroom_server.engine.warmup.presets import resolve
source = ModelSource(id="demo", location=str(files("darkroom_server") / "demo_model"))
found = find_model(source, safety_checker=False)
runtime = resolve(EngineConfig(models=()), found.family.half)
load_pipeline(found, runtime.dtype).to(runtime.device)
"""
"""What a start cannot avoid: the imports, and the load itself."""


@dataclass(frozen=True, slots=True)
class Start:
    """What one start chose; ``image`` is the digest of an exact image."""

    format: str
    rows_before: int
    rows_after: int
    image: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All starts; ``start_ratio`` compares second starts with the unavoidable part."""

    quiet: Start
    busy: list[Start]
    start_ratio: float


def measure(starts: int, load_seconds: float, turns: int) -> Report:
    """Start the demo model ``starts`` times beside a burner, and once without."""
    quiet = _start("quiet", load_seconds)
    busy = []
    with _burning():
        for number in range(1, starts + 1):
            busy.append(_start(f"busy {number}", load_seconds))
    return Report(quiet, busy, _start_ratio(turns))


def _start(name: str, load_seconds: float) -> Start:
    """One first start: its measurement cache is empty."""
    with tempfile.TemporaryDirectory() as cache, _cache(cache):
        began = time.monotonic()
        with server() as running, Client(running.address, insecure=True, timeout=600) as client:
            seconds = time.monotonic() - began
            before = client.models()[0]
            image = client.generate(PROMPT, seed=7, steps=10, exact=True).images[0].data
            _load(client, load_seconds)
            after = client.models()[0]
    start = Start(
        format=_format(before),
        rows_before=_rows(before),
        rows_after=_rows(after),
        image=hashlib.sha256(image).hexdigest()[:16],
        seconds=seconds,
    )
    print(
        f"{name:8} {start.seconds:6.1f} s  {start.format}  rows {start.rows_before} at start, "
        f"{start.rows_after} after the load  image {start.image}",
        flush=True,
    )
    return start


def _load(client: Client, seconds: float) -> None:
    """Keep ``CALLERS`` images in flight."""
    end = time.monotonic() + seconds

    def call(number: int) -> None:
        while time.monotonic() < end:
            try:
                client.generate(PROMPT, seed=number, steps=8)
            except DarkroomError as error:
                print(f"a call failed: {error}", flush=True)
                time.sleep(0.5)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(call, range(CALLERS)))


def _start_ratio(turns: int) -> float:
    """Second starts divided by the imports and the load, measured in turns; the median."""
    ratios = []
    with tempfile.TemporaryDirectory() as cache, _cache(cache):
        with server():
            pass  # The first start fills the cache.
        for turn in range(turns):
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", LOAD], check=True, stderr=subprocess.DEVNULL)
            unavoidable = time.monotonic() - began
            began = time.monotonic()
            with server():
                second = time.monotonic() - began
            ratios.append(second / unavoidable)
            print(
                f"turn {turn + 1}: second start {second:.1f} s, imports and load "
                f"{unavoidable:.1f} s: {ratios[-1]:.2f}",
                flush=True,
            )
    return statistics.median(ratios)


@contextmanager
def _burning() -> Iterator[None]:
    """Processes that use every core."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    burners = [context.Process(target=_burn, args=(os.getpid(),)) for _ in range(cores)]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.join()


def _burn(parent: int) -> None:
    while os.getppid() == parent:
        sum(range(100_000))


@contextmanager
def _cache(folder: str) -> Iterator[None]:
    """Servers that start in the block keep their measurements in ``folder``."""
    # The cache of models stays.
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    changed = {
        "XDG_CACHE_HOME": folder,
        "HF_HOME": os.environ.get("HF_HOME") or str(usual / "huggingface"),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _format(model: Model) -> str:
    if model.runtime is None:
        raise RuntimeError("the server is ready, and its model is not")
    denoiser, vae = (
        "channels_last" if last else "contiguous"
        for last in (model.runtime.channels_last, model.runtime.vae_channels_last)
    )
    return f"{model.runtime.dtype} {denoiser}, VAE {vae}"


def _rows(model: Model) -> int:
    if model.limits is None:
        raise RuntimeError("the server is ready, and its model is not")
    return model.limits.max_rows
