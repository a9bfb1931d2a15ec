"""Measures LoRA rows on the demo model: ``python -m bench.engine.loras loras``.

Callers in closed loops ask for images with adapters of their own. Three engines serve them in
turns, with the same loop, samples and batch scheduler: one mixes the adapters in a batch, two form
groups by adapter, which switch by PEFT's ``set_adapters`` or by weights with the adapter in them.

Each engine has a process of its own, as under a server. In one process, each engine's thread would
have a team of OpenMP's threads, and libgomp lets threads sleep when they outnumber the cores.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.engine.adapter_groups import (
    RANK,
    GroupedAdapters,
    fused_switch,
    peft_switch,
    write_adapters,
)
from bench.report.benchmark import Amount, Benchmark, Measurement, run_named
from bench.report.goals import Goal
from bench.report.machine import model_source
from bench.report.markdown import goals_table, table
from bench.report.results import Results, model_facts
from bench.report.statistics import Median, bootstrap_median
from darkroom_server.core.engine_config import EngineConfig, Preset
from darkroom_server.core.events import BatchDone, Event, JobFailed, JobFinished
from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import ImageFormat, Job
from darkroom_server.engine.device.malloc import keep_freed_memory
from darkroom_server.engine.device.spinning import Spinning
from darkroom_server.engine.loading.startup import start_loop

CALLERS = 8
STEPS = 30
TIMEOUT_SECONDS = 300.0
GROUPED = ("set_adapters", "fused")
NAMES = {
    "mixed": "adapters mixed in a batch",
    "set_adapters": "a batch per adapter, `set_adapters`",
    "fused": "a batch per adapter, fused copies",
}


class ClosedLoop:
    """An engine on a thread of its own, and callers that each wait for their image."""

    def __init__(self, config: EngineConfig, kind: str) -> None:
        self._config = config
        self._kind = kind
        self._started = threading.Event()
        self._idle = threading.Event()
        self._left: list[Job] = []
        self._finished: list[float] = []
        self._running = 0
        self._failure = ""
        self._adapters_of_batches: list[int] = []
        self.loop: Any = None
        self.info: Any = None
        self._thread = threading.Thread(target=self._run, name=kind, daemon=True)
        self._thread.start()
        self._started.wait()

    def images_per_second(self, jobs: Sequence[Job]) -> float:
        """Serve ``jobs`` to the callers, all of whom end at about the same time."""
        self._idle.clear()
        self._finished, self._adapters_of_batches, self._left = [], [], list(jobs[CALLERS:])
        self._running = min(CALLERS, len(jobs))
        began = time.monotonic()
        for job in jobs[:CALLERS]:
            self.loop.submit(job)
        if not self._idle.wait(TIMEOUT_SECONDS) or self._failure:
            raise RuntimeError(self._failure or "no image in time")
        return len(jobs) / (self._finished[-1] - began)

    def most_adapters(self) -> int:
        """The most adapters of a batch in the last run."""
        return max(self._adapters_of_batches)

    def close(self) -> None:
        """End the engine."""
        self.loop.close()
        self._thread.join()

    def _run(self) -> None:
        self.loop, ready = start_loop(self._config, self._emit)
        (self.info,) = ready.models
        model = self.loop._runner.models[self.info.id]
        if self._kind in GROUPED:
            make = peft_switch if self._kind == "set_adapters" else fused_switch
            with torch.inference_mode():
                grouped = GroupedAdapters(make(model.adapters.pipeline, self._config.adapters))
            model.adapters = self.loop._adapters = grouped
        self._started.set()
        self.loop.run()

    def _emit(self, event: Event) -> None:
        match event:
            case JobFinished():
                self._finished.append(time.monotonic())
                if self._left:
                    self.loop.submit(self._left.pop(0))
                else:
                    self._running -= 1
                    if not self._running:
                        self._idle.set()
            case JobFailed():
                self._failure = event.failure.message
                self._idle.set()
            case BatchDone():
                self._adapters_of_batches.append(event.adapters)


class EngineProcess:
    """A process with the settings of a server's engine process, for one `ClosedLoop`."""

    _loop: ClosedLoop
    """Of the process that runs it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(1, context, initializer=_as_an_engine)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns there; its exceptions are raised here."""
        return self._executor.submit(function, *arguments).result()

    def start(self, config: EngineConfig, kind: str) -> Any:
        """Start the loop; gives its ``ModelInfo``."""
        return self.call(_start, config, kind)

    def images_per_second(self, jobs: Sequence[Job]) -> tuple[float, int]:
        """The rate of ``jobs``, and the most adapters of one of their batches."""
        rate, most = self.call(_serve, jobs)
        return rate, most

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()


def _as_an_engine() -> None:
    keep_freed_memory()
    Spinning.start()


def _start(config: EngineConfig, kind: str) -> Any:
    EngineProcess._loop = ClosedLoop(config, kind)
    return EngineProcess._loop.info


def _serve(jobs: Sequence[Job]) -> tuple[float, int]:
    loop = EngineProcess._loop
    return loop.images_per_second(jobs), loop.most_adapters()


def job_with(info: Any, number: int, adapters: int) -> Job:
    """A job of a caller; callers take the adapters in turn."""
    defaults = info.defaults
    return Job(
        id=f"{time.monotonic_ns()}-{number}",
        model=info.id,
        prompt="a large yellow star on a blue background",
        negative_prompt="",
        width=defaults.width,
        height=defaults.height,
        steps=STEPS,
        guidance_scale=4.0,
        seed=number,
        image_count=1,
        scheduler=defaults.scheduler,
        format=ImageFormat.RAW_RGB,
        quality=90,
        exact=False,
        submitted_at=time.monotonic(),
        loras=(Lora(id=f"lora-{number % adapters}"),) if adapters else (),
    )


def measure(options: argparse.Namespace) -> Measurement:
    """Single batches with and without adapters, then rounds of all engines in turns."""
    source = model_source(options.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        import diffusers

        pipeline = diffusers.DiffusionPipeline.from_pretrained(source.location)
        sources = write_adapters(Path(folder), pipeline, CALLERS)
        config = EngineConfig(
            models=(source,), rows=2 * CALLERS, preset=Preset.FAST, adapters=tuple(sources)
        )
        with contextlib.closing(EngineProcess()) as alone:
            passes = alone.call(batch_times, config, options.batches)
        engines = {name: stack.enter_context(contextlib.closing(EngineProcess())) for name in NAMES}
        infos = {name: engine.start(config, name) for name, engine in engines.items()}
        info = infos["mixed"]
        closed: dict[str, dict[str, list[float]]] = {}
        for adapters in (8, 4):
            rates = closed[str(adapters)] = {name: [] for name in NAMES}
            for round in range(options.rounds + 1):
                names = list(NAMES)[round % 3 :] + list(NAMES)[: round % 3]
                for name in names:
                    # The first round warms up.
                    images = options.images if round else 2
                    jobs = [job_with(info, i, adapters) for i in range(images)]
                    rate, most = engines[name].images_per_second(jobs)
                    assert not round or (most > 1) is (name == "mixed"), (name, most)
                    if round:
                        rates[name].append(rate)
                    print(f"{adapters} adapters, round {round}, {name}: {rate:.2f}", flush=True)
    return Measurement(
        figures={"closed": closed, "batch": passes},
        model=model_facts(info),
        settings={"callers": CALLERS, "steps": STEPS, "rank": RANK},
    )


def batch_times(config: EngineConfig, batches: int) -> dict[str, list[float]]:
    """Seconds of a UNet call of eight rows, of four images, with four adapters and with none."""

    def end_after_the_last(event: Event) -> None:
        if isinstance(event, JobFailed):
            raise RuntimeError(event.failure.message)
        if isinstance(event, JobFinished):
            running.discard(event.job_id)
            if not running:
                loop.close()

    # On this thread, so that OpenMP has one team. The jobs let the loop read the adapters.
    loop, ready = start_loop(config, end_after_the_last)
    (info,) = ready.models
    first = [replace(job_with(info, i, 4), steps=2) for i in range(4)]
    running = {job.id for job in first}
    for job in first:
        loop.submit(job)
    loop.run()
    model: Any = loop._runner.models[info.id]
    jobs = {
        "four": [(job_with(info, i, 4), 2) for i in range(4)],
        "none": [(job_with(info, i, 0), 2) for i in range(4)],
    }
    generator = torch.Generator().manual_seed(0)
    rows, dtype = 8, model.memory_format.dtype
    side = info.defaults.height // model.latent_factor
    latents = torch.randn(rows, model.latent_channels, side, side, generator=generator)
    width = model.unet.config.cross_attention_dim
    context = torch.randn(rows, 77, width, generator=generator).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    predicted: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        sample = latents.to(dtype).contiguous(memory_format=model.memory_format.layout)
        times = torch.linspace(900, 50, rows)
        for number in range(batches + 5):
            for name in sorted(jobs, reverse=bool(number % 2)):
                began = time.perf_counter()
                with model.precision(), model.adapters.denoising(jobs[name]):
                    (predicted[name],) = model.unet(
                        sample, times, encoder_hidden_states=context, return_dict=False
                    )
                if number >= 5:  # The first ones warm up.
                    seconds[name].append(time.perf_counter() - began)
            assert not torch.equal(predicted["four"], predicted["none"])
    return seconds


def ratio_of(results: Results, adapters: int) -> Median:
    """Images/s of mixed rows by those of the better grouping of the same round."""
    rates = results.figures["closed"][str(adapters)]
    rounds = zip(rates["mixed"], *(rates[name] for name in GROUPED), strict=True)
    return bootstrap_median([mixed / max(grouped) for mixed, *grouped in rounds])


def batch_ratio(results: Results) -> Median:
    """How fast a batch with four adapters is, by the same batch without; pairs in turns."""
    seconds = results.figures["batch"]
    pairs = zip(seconds["none"], seconds["four"], strict=True)
    return bootstrap_median([none / four for none, four in pairs])


def goals(results: Results) -> list[Goal]:
    """What the rows must reach."""
    named = [
        ("8 adapters mixed, against the better grouping", ratio_of(results, 8), 1.5, False),
        ("4 adapters mixed, against the better grouping", ratio_of(results, 4), 1.15, False),
        ("a batch with four adapters, against one without", batch_ratio(results), 0.87, True),
    ]
    return [
        Goal(name, m.value, bound, True, (m.low, m.high), is_cost=is_cost)
        for name, m, bound, is_cost in named
    ]


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    settings = results.settings
    rows = [
        [
            NAMES[name],
            *(
                f"{statistics.median(results.figures['closed'][adapters][name]):.2f}"
                for adapters in ("8", "4")
            ),
        ]
        for name in NAMES
    ]
    none, four = (
        statistics.median(results.figures["batch"][name]) * 1000 for name in ("none", "four")
    )
    return [
        f"{settings['callers']} closed callers ask for images of {settings['steps']} steps with "
        f"guidance, each with an adapter of rank {settings['rank']} for all attention layers; with "
        "4 adapters, two callers share one. The same loop and batch scheduler serve them in three "
        "ways, which take turns. Ratios are of the same round; intervals are 95 % of the median.",
        goals_table("ratio of images/s", goals(results), "×"),
        table(["images/s, median", "8 adapters", "4 adapters"], rows),
        f"A UNet call of 8 rows takes {none:.1f} ms, with four adapters {four:.1f} ms (medians of "
        f"{len(results.figures['batch']['none'])} in turns).",
    ]


BENCHMARK = Benchmark(
    name="loras",
    title="LoRA rows",
    command="make bench-lora",
    amounts={
        "rounds": Amount(9, 1, "rounds of each number of adapters"),
        "images": Amount(2 * CALLERS, CALLERS, "images of each engine and round"),
        "batches": Amount(120, 10, "single batches with and without adapters"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
)


if __name__ == "__main__":
    run_named([BENCHMARK], "bench.engine.loras", __doc__ or "", None)
