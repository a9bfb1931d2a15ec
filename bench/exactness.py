"""How far an image drawn in a busy batch is from the same image drawn alone.

``python -m bench.exactness`` writes ``bench/results`` and a part of ``docs/reproducibility.md``, in
a few minutes on two cores. It times nothing: a busy machine does it no harm.
"""

import argparse
import math
import statistics
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.contender import WIDEST
from bench.exactness_page import page
from bench.machine import model_source, this_machine, versions
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sections import DOCS, write_section
from bench.threaded import job_of, start
from bench.workload import Request, mixed
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
    """An engine with neighbours to draw an image among."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = ThreadEngine(config)
        self._changed = threading.Condition()
        self._stepping: dict[str, int] = {}
        self._images: dict[str, ImageReady] = {}
        self._gone: set[str] = set()
        self._runs = 0
        self.ready: EngineReady = start(self._engine, self._emit)
        self.info = self.ready.models[0]

    def alone(self, request: Request) -> NDArray[np.uint8]:
        """The pixels of ``request``, [height, width, 3], with nobody else there."""
        return self._pixels(self._job(request))

    def among(
        self, request: Request, neighbours: Sequence[Request], *, exact: bool = False
    ) -> NDArray[np.uint8]:
        """The same while ``neighbours`` take part in every pass."""
        crowd = [replace(each, steps=NEIGHBOUR_STEPS) for each in neighbours]
        jobs = [self._job(each) for each in crowd]
        for job in jobs:
            self._engine.submit(job)
        self._wait(lambda: all(job.id in self._stepping for job in jobs))
        job = self._job(request)
        pixels = self._pixels(replace(job, exact=exact))
        images = 1 if exact else len(jobs) + 1
        if self._stepping[job.id] != images * job.rows_per_image:
            raise RuntimeError(f"a pass held {self._stepping[job.id]} rows, not {images} images")
        for job in jobs:
            self._engine.cancel(job.id)
        self._wait(lambda: all(job.id in self._gone for job in jobs))
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

    def _wait(self, condition: Any) -> None:
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
                    self._gone.add(event.job_id)
            self._changed.notify_all()


def psnr(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = float(np.mean((image.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measure(
    source: ModelSource, dtype: Dtype, images: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of ``dtype``, and what the engine says of the model."""
    crowd = Crowd(EngineConfig(models=(source,), dtype=dtype, max_rows=2 * WIDEST))
    requests = [replace(request, steps=STEPS) for request in mixed(images, seed=2)]
    neighbours = mixed(WIDEST, seed=3)
    alone = [crowd.alone(request) for request in requests]
    again = [crowd.alone(request) for request in requests]
    widths = []
    for width in _widths(crowd.info.limits.max_rows // 2):
        busy = [crowd.among(request, neighbours[: width - 1]) for request in requests]
        widths.append({"images": width, **_compare(alone, busy)})
    # As many as fit in one pass: more would wait until the first are done.
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
    """Images in a pass: one, then twice as many each time, then the most that one may hold."""
    return [*(width for width in (1, 2, 4, 8) if width < most), most]


def _compare(
    alone: Sequence[NDArray[np.uint8]], busy: Sequence[NDArray[np.uint8]]
) -> dict[str, float | None]:
    """PSNR in dB, None where all are identical, and the largest difference of a value in 255."""
    ratios = [psnr(a, b) for a, b in zip(alone, busy, strict=True)]
    most = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(alone, busy, strict=True))
    median = statistics.median(ratios)
    return {
        "identical": sum(math.isinf(ratio) for ratio in ratios) / len(ratios),
        "lowest": None if math.isinf(min(ratios)) else min(ratios),
        "median": None if math.isinf(median) else median,
        "largest_difference": most,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.exactness", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--images", type=int, default=6, help="drawn at each width")
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    source = model_source(options.model)
    figures, facts = [], {}
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        figure, facts[dtype.value] = measure(source, dtype, options.images)
        figures.append(figure)
    results = Results(
        bench="exactness",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=facts,
        settings={"images": options.images, "steps": STEPS},
        figures={"dtypes": figures},
        note=options.note,
    )
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("reproducibility.md", "Reproducibility", "exactness", text, options.docs)


if __name__ == "__main__":
    main()
