"""The difference between an image generated in a shared batch and the same image alone.

It takes no times, so a busy machine does not change its figures.
"""

import argparse
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.inprocess.engine import job_of, start
from bench.inprocess.remote import MAX_BATCH_IMAGES
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source
from bench.report.markdown import table
from bench.report.results import Results, model_facts
from bench.workload.requests import Request, mixed
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource
from darkroom_server.core.events import (
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    SampleProgress,
)
from darkroom_server.core.job import ImageFormat, Job

STEPS = 20
NEIGHBOUR_STEPS = 150


class Crowd:
    """An engine that generates an image alone, or in batches shared with others."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = ThreadEngine(config)
        self._changed = threading.Condition()
        self._stepping: dict[str, int] = {}
        self._images: dict[str, ImageReady] = {}
        self._ended: set[str] = set()
        self._runs = 0
        self.ready: EngineReady = start(self._engine, self._emit)
        self.info = self.ready.models[0]

    def alone(self, request: Request) -> NDArray[np.uint8]:
        """The pixels of ``request``, [height, width, 3], generated alone."""
        return self._pixels(self._job(request))

    def among(
        self, request: Request, neighbours: Sequence[Request], *, exact: bool = False
    ) -> NDArray[np.uint8]:
        """The same while ``neighbours`` share every batch, which ``exact`` forbids."""
        crowd = [replace(each, steps=NEIGHBOUR_STEPS) for each in neighbours]
        jobs = [self._job(each) for each in crowd]
        for job in jobs:
            self._engine.submit(job)
        self._wait(lambda: all(job.id in self._stepping for job in jobs))
        job = self._job(request)
        pixels = self._pixels(replace(job, exact=exact))
        images = 1 if exact else len(jobs) + 1
        if self._stepping[job.id] != images * self.info.rows_per_image(job):
            raise RuntimeError(f"a batch held {self._stepping[job.id]} rows, not {images} images")
        for job in jobs:
            self._engine.cancel(job.id)
        self._wait(lambda: all(job.id in self._ended for job in jobs))
        return pixels

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _job(self, request: Request) -> Job:
        self._runs += 1
        job = job_of(request, self.info, 0.0, self._runs)
        return replace(job, format=ImageFormat.RAW_RGB)

    def _pixels(self, job: Job) -> NDArray[np.uint8]:
        self._engine.submit(job)
        self._wait(lambda: job.id in self._images)
        data = self._images.pop(job.id).image.data
        return np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def _emit(self, event: Event) -> None:
        with self._changed:
            match event:
                case SampleProgress():
                    self._stepping[event.job_id] = event.rows
                case ImageReady():
                    self._images[event.job_id] = event
                case JobCancelled() | JobFailed():
                    self._ended.add(event.job_id)
            self._changed.notify_all()


def psnr(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = float(np.mean((image.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare_dtype(
    source: ModelSource, dtype: Dtype, images: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of ``dtype``, and the facts of the model."""
    crowd = Crowd(EngineConfig(models=(source,), dtype=dtype, rows=2 * MAX_BATCH_IMAGES))
    requests = [replace(request, steps=STEPS) for request in mixed(images, seed=2)]
    neighbours = mixed(MAX_BATCH_IMAGES, seed=3)
    alone = [crowd.alone(request) for request in requests]
    again = [crowd.alone(request) for request in requests]
    widths = []
    for width in _widths(crowd.info.limits.max_rows // 2):
        busy = [crowd.among(request, neighbours[: width - 1]) for request in requests]
        widths.append({"images": width, **_compare(alone, busy)})
    # As many as fit in one batch: more would wait until the first ones finish.
    others = min(3, crowd.info.limits.max_rows // 2)
    exact = [crowd.among(r, neighbours[:others], exact=True) for r in requests]
    solo = [crowd.among(r, [], exact=True) for r in requests]
    crowd.close()
    figures = {
        "dtype": crowd.info.runtime.dtype,
        "widths": widths,
        "again": _compare(alone, again),
        "exact": _compare(solo, exact),
        "others": others,
    }
    return figures, model_facts(crowd.info)


def _widths(most: int) -> list[int]:
    """Images in a batch: powers of two below ``most``, then ``most``."""
    return [*(width for width in (1, 2, 4, 8) if width < most), most]


def _compare(
    alone: Sequence[NDArray[np.uint8]], busy: Sequence[NDArray[np.uint8]]
) -> dict[str, float | None]:
    """PSNR in dB, None if all are identical, and the largest difference of a value in 255."""
    ratios = [psnr(a, b) for a, b in zip(alone, busy, strict=True)]
    most = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(alone, busy, strict=True))
    median = statistics.median(ratios)
    return {
        "identical": sum(math.isinf(ratio) for ratio in ratios) / len(ratios),
        "lowest": None if math.isinf(min(ratios)) else min(ratios),
        "median": None if math.isinf(median) else median,
        "largest_difference": most,
    }


def measure(options: argparse.Namespace) -> Measurement:
    """Compare in float32 and in bfloat16."""
    source = model_source(options.model)
    figures, facts = [], {}
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        figure, facts[dtype.value] = compare_dtype(source, dtype, options.images)
        figures.append(figure)
    return Measurement(figures={"dtypes": figures}, model=facts, settings={"steps": STEPS})


def describe(results: Results) -> list[str]:
    """A text, and a table for each dtype."""
    return [
        f"{results.settings['images']} images of {results.settings['steps']} steps, each generated "
        "alone, then in batches shared with other images from the first step to the last. PSNR in "
        "dB against the image generated alone; the largest difference is of one colour value, 0 to "
        "255.",
        *(_dtype(figures) for figures in results.figures["dtypes"]),
    ]


def _dtype(figures: dict[str, Any]) -> str:
    rows = [[str(each["images"]), *_cells(each)] for each in figures["widths"]]
    rows.append(["alone again", *_cells(figures["again"])])
    rows.append([f"`exact`, among {figures['others']} others", *_cells(figures["exact"])])
    heads = ["images in each batch", "identical", "PSNR, median", "lowest", "largest difference"]
    return f"### {figures['dtype']}\n\n{table(heads, rows)}"


def _cells(figure: dict[str, Any]) -> list[str]:
    ratios = ["∞" if figure[k] is None else f"{figure[k]:.1f}" for k in ("median", "lowest")]
    return [f"{figure['identical']:.0%}", *ratios, str(figure["largest_difference"])]


BENCHMARK = Benchmark(
    name="exactness",
    title="Measured",
    command="python -m bench.micro exactness",
    amounts={"images": Amount(6, 1, "images of each batch size")},
    measure=measure,
    describe=describe,
    page="reproducibility.md",
)
