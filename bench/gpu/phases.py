"""The phases of the benchmark, each in a process of its own, and what they find, saved at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from bench.gpu.forward import REPEATS, ROWS
from bench.gpu.sd14 import cached_sd14
from bench.inprocess.remote import ProcessFailed, yields_of_process
from bench.report.machine import model_source
from bench.report.results import ROOT, Results
from bench.tiny_families import ONE_EACH
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.job import SchedulerName

Figures = dict[str, Any]
"""What a phase has found since it last yielded, in JSON's types."""

PHASES = "phases"
"""The key of the notes about the phases themselves among the figures."""


LIMIT = 3
"""A phase is stopped after this many times what it usually takes: a hang leaves time for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much the phases do, and where.

    ``device`` is "cuda", or "cpu" for a trial. ``sd14`` is the folder of Stable Diffusion 1.4, ""
    for that of the cache. ``demo`` is the folder of the model whose images are compared, "" for the
    demo model. ``schedulers`` are those that are compared, empty for all, in batches of at most
    ``batch_rows``. ``threads`` are torch's on a CPU, None for all. ``measurements`` is a
    folder that remembers what engines measure at their start, None for none, and ``compiled`` one
    that keeps denoisers that were compiled. ``side`` is that of a
    square matrix to multiply, ``copied_bytes`` what a copy moves, ``spare_bytes`` what remains of
    the memory once it is short. ``closed``, ``arrivals``, ``pairs`` and ``lone`` are requests of
    each closed loop, of the open loop, and alone; ``long_steps`` are those of images that are not
    of the mixed load. ``images`` are those of a setting in the table of memory.
    """

    device: str = "cuda"
    sd14: str = ""
    demo: str = ""
    schedulers: tuple[SchedulerName, ...] = ()
    families: tuple[FamilyCase, ...] = tuple(ONE_EACH)
    batch_rows: int = 32
    threads: int | None = None
    measurements: str | None = None
    compiled: str = str(ROOT / "bench" / "work" / "compiled")
    rows: tuple[int, ...] = ROWS
    forms: tuple[str, ...] = ()
    repeats: int = REPEATS
    side: int = 8192
    copied_bytes: int = 1 << 31
    spare_bytes: int = 64 << 20
    closed: int = 48
    arrivals: int = 50
    pairs: int = 4
    lone: int = 5
    long_steps: int = 50
    images: int = 1
    seed: int = 0

    def config(self, *sources: ModelSource, **fields: Any) -> EngineConfig:
        """The configuration of an engine on the device, which ``fields`` complete."""
        usual: dict[str, Any] = {
            "device": self.device,
            "threads": self.threads,
            "measurement_cache": self.measurements,
        }
        return EngineConfig(models=sources, **{**usual, **fields})

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    def sd14_source(self) -> ModelSource:
        """Stable Diffusion 1.4, which is written into the cache if it is not there."""
        folder = self.sd14 or str(cached_sd14(self.torch_device))
        return ModelSource(id="sd14", location=folder)

    def demo_source(self) -> ModelSource:
        """The model whose images are compared."""
        return model_source(self.demo or None)


class Outcome(StrEnum):
    """How a phase ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the benchmark: ``measure`` yields what it finds, and raises if something is wrong.

    ``seconds`` is about what it takes on a GPU of a data centre; with less time remaining it is
    skipped, and after ``LIMIT`` times as much it is stopped.
    """

    name: str
    seconds: float
    measure: Callable[[Plan], Iterator[Figures]]


def isolated(phase: Phase, plan: Plan, seconds: float) -> Iterator[Figures]:
    """Run ``phase`` in a new process for at most ``seconds``."""
    return yields_of_process(phase.measure, plan, seconds=seconds)


def run_phases(
    phases: Sequence[Phase],
    plan: Plan,
    results: Results,
    *,
    budget: float,
    save: Callable[[Results], object],
    start: Callable[[Phase, Plan, float], Iterator[Figures]] = isolated,
    now: Callable[[], float] = time.monotonic,
) -> bool:
    """Run ``phases`` in ``budget`` seconds; returns False if one failed.

    Their figures go to ``results``, which ``save`` gets whenever a phase has found something. A
    phase that fails keeps what it found before, and the next ones run. One that was done in an
    earlier run is not run again.
    """
    began = now()
    notes = results.figures.setdefault(PHASES, {})
    for phase in phases:
        if notes.get(phase.name, {}).get("outcome") == Outcome.DONE:
            continue
        results.figures.pop(phase.name, None)
        phase_began = now()
        left = budget - (phase_began - began)
        if left < phase.seconds:
            why = f"{left:.0f} s remained, and it takes about {phase.seconds:.0f}"
            note = {"outcome": Outcome.SKIPPED, "why": why}
        else:
            figures = start(phase, plan, min(left, LIMIT * phase.seconds))
            note = _collect(figures, phase.name, results, save)
        notes[phase.name] = {**note, "seconds": round(now() - phase_began, 1)}
        save(results)
        print(f"{phase.name}: {note['outcome']} {note['why']}".rstrip(), flush=True)
    return not any(notes[each.name]["outcome"] == Outcome.FAILED for each in phases)


def _collect(
    figures: Iterator[Figures], phase: str, results: Results, save: Callable[[Results], object]
) -> dict[str, str]:
    """Save the ``figures`` of ``phase`` as they come; returns its outcome, and why it failed."""
    try:
        for found in figures:
            results.figures.setdefault(phase, {}).update(found)
            save(results)
    except Exception as error:  # noqa: BLE001 - it is recorded, and others are measured.
        why = str(error)
        if not isinstance(error, ProcessFailed):  # It says the type itself.
            why = f"{type(error).__name__}: {why}"
        return {"outcome": Outcome.FAILED, "why": why}
    return {"outcome": Outcome.DONE, "why": ""}
