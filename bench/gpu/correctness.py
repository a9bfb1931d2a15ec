"""Whether a device makes the images that a CPU makes, and a batch those that it makes alone."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.phases import Figures, Plan
from bench.inprocess.engine import job_of
from bench.inprocess.loop import Generated, generate
from bench.tiny_families.case import FamilyCase
from bench.workload.requests import mixed
from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.core.events import BatchDone
from darkroom_server.core.job import ImageFormat, Job, SchedulerName
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.failures import is_fatal, one_line

STEPS = 12
GUIDANCE = 5.0
ALLOWED = 0.25
"""How far an image may be off, as a part of how far two images of different jobs are apart.

Half precision is off by a few hundredths, another prompt or seed by one.
"""

ALONE = "alone-"
"""Before the id of a job that is run again, alone."""


class WrongImages(RuntimeError):
    """Images are not those that they should be; the message says which."""


def preset(name: Preset, plan: Plan) -> Iterator[Figures]:
    """Jobs of every scheduler, under a preset, beside the CPU's.

    Each job runs in company, and again alone. Raises ``WrongImages``.
    """
    source = plan.demo_source()
    jobs = partial(_scheduler_jobs, plan)
    on_cpu = generate(_in_float32(source, "cpu", plan), jobs)
    config = plan.config(source, preset=name, rows=plan.batch_rows)
    made = generate(config, lambda info: with_lone(jobs(info)))
    figures = compared(made, on_cpu)
    yield {**figures, "runtime": asdict(made.ready.models[0].runtime)}
    _check({str(name): figures})


def families(plan: Plan) -> Iterator[Figures]:
    """A tiny model of each family: in float32 beside the CPU's, then in its own half precision.

    Raises ``WrongImages`` at the end, if the device is not lost.
    """
    found: dict[str, Figures] = {}
    for case in plan.families:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[case.name] = _family(case, Path(folder) / "model", plan)
            except Exception as error:
                if is_fatal(error):
                    raise
                found[case.name] = {"wrong": [one_line(error)]}
        yield {"families": found}
    _check(found)


def with_lone(jobs: Sequence[Job]) -> list[Job]:
    """``jobs``, and each of them once more, alone in its batches."""
    return [*jobs, *(replace(job, id=f"{ALONE}{job.id}", exact=True) for job in jobs)]


def compared(made: Generated, on_cpu: Generated) -> Figures:
    """How far images are off, as parts of how far two images of different jobs are apart.

    ``wrong`` says in one line each what is not as it should be.
    """
    pairs = itertools.pairwise(on_cpu.images.values())
    distances = [difference(one, other) for one, other in pairs]
    apart = statistics.median(distances) if distances else 0.0
    wrong = [f"{id}: {failure.message}" for id, failure in made.failures.items()]
    wrong += [f"{id} on the CPU: {failure.message}" for id, failure in on_cpu.failures.items()]
    if not any(isinstance(e, BatchDone) and e.samples > 1 for e in made.events):
        wrong.append("no batch was shared")
    if apart == 0:
        wrong.append("all images are alike")
    jobs: dict[str, Figures] = {}
    for id, wanted in on_cpu.images.items():
        image, alone = made.images.get(id), made.images.get(f"{ALONE}{id}")
        if image is None or alone is None:
            continue  # It failed, which is said above.
        off = {"cpu": difference(image, wanted), "alone": difference(image, alone)}
        jobs[id] = {name: value / apart if apart else None for name, value in off.items()}
        wrong += [
            f"{id} is off by {value / apart:.2f} beside {name}"
            for name, value in off.items()
            if apart and not value <= ALLOWED * apart
        ]
    return {"apart": apart, "jobs": jobs, "wrong": wrong}


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean absolute difference of two images, in levels of 256."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def _family(case: FamilyCase, folder: Path, plan: Plan) -> Figures:
    source = ModelSource(id="tiny", location=str(case.write(folder)))
    jobs = partial(_family_jobs, case)
    on_cpu = generate(_in_float32(source, "cpu", plan), jobs)
    plain = generate(_in_float32(source, plan.device, plan), lambda info: with_lone(jobs(info)))
    figures = compared(plain, on_cpu)
    own = plan.config(source, preset=Preset.FAST, rows=plan.batch_rows)
    half = generate(own, jobs)
    figures["half"] = half.ready.models[0].runtime.dtype
    figures["wrong"] += [f"{id}: {failure.message}" for id, failure in half.failures.items()]
    # Random weights amplify what half precision rounds: its images cannot be compared.
    flat = (id for id, image in half.images.items() if len(np.unique(image)) <= 8)
    figures["wrong"] += [f"{id} is a flat picture in {figures['half']}" for id in flat]
    return figures


def _scheduler_jobs(plan: Plan, info: ModelInfo) -> list[Job]:
    """A job of each scheduler, with a prompt and a seed of its own."""
    names = [offer.name for offer in info.schedulers]
    if plan.schedulers:
        names = [name for name in names if name in plan.schedulers]
    requests = mixed(len(names), plan.seed)
    return [
        replace(
            job_of(replace(request, guidance_scale=GUIDANCE, steps=STEPS), info, time.monotonic()),
            id=str(name),
            scheduler=name,
            format=ImageFormat.RAW_RGB,
        )
        for name, request in zip(names, requests, strict=True)
    ]


def _family_jobs(case: FamilyCase, info: ModelInfo) -> list[Job]:
    """The first job of ``case``, with three seeds."""
    (request,) = mixed(1, seed=0)
    usual = replace(
        job_of(request, info, time.monotonic()),
        scheduler=SchedulerName.MODEL,
        format=ImageFormat.RAW_RGB,
    )
    fields: dict[str, Any] = dict(case.jobs[0])
    return [replace(usual, **{**fields, "id": f"seed {seed}", "seed": seed}) for seed in range(3)]


def _in_float32(source: ModelSource, device: str, plan: Plan) -> EngineConfig:
    return plan.config(
        source, device=device, preset=Preset.FAST, dtype=Dtype.FLOAT32, rows=plan.batch_rows
    )


def _check(found: Mapping[str, Figures]) -> None:
    wrong = [f"{name}: {each}" for name, figures in found.items() for each in figures["wrong"]]
    if wrong:
        raise WrongImages("; ".join(wrong))
