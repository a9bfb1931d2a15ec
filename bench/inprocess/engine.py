"""Darkroom's engine without its server: submits jobs at their arrival and times the images."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import NO_OPTIONS, Request
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine import Engine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import (
    BatchDone,
    EngineDied,
    EngineReady,
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    MemoryReport,
)
from darkroom_server.core.job import ImageFormat, Job
from darkroom_server.core.model import ModelInfo


def job_of(request: Request, info: ModelInfo, submitted_at: float, run: int = 0) -> Job:
    """``request`` as a job for the model of ``info``, at its default size."""
    return Job(
        id=f"{run}/{request.index}",
        model=info.id,
        prompt=request.prompt,
        negative_prompt="",
        width=info.defaults.width,
        height=info.defaults.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        image_count=request.images,
        scheduler=info.defaults.scheduler,
        format=ImageFormat.PNG,
        quality=info.defaults.quality,
        exact=False,
        submitted_at=submitted_at,
    )


def start(engine: Engine, emit: Callable[[Event], None]) -> EngineReady:
    """Start ``engine`` and wait until it is ready; later events go to ``emit``.

    Raises ``RuntimeError`` if it dies.
    """
    first: queue.SimpleQueue[EngineReady | EngineDied] = queue.SimpleQueue()
    started = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, EngineReady | EngineDied) and not started.is_set():
            started.set()
            first.put(event)
        else:
            emit(event)

    engine.start(listen)
    event = first.get()
    if isinstance(event, EngineDied):
        raise RuntimeError(event.message)
    return event


class EnginePeer:
    """Feeds an engine from the thread that calls ``serve``, which never calls torch.

    ``options`` are fields of every job.
    """

    def __init__(self, engine: Engine, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        self._engine = engine
        self._options = options
        self._changed = threading.Condition()
        self._batch_times: list[tuple[int, float]] = []
        self._run = 0
        self._began = 0.0
        self._arrivals = Arrivals([])
        self._waiting: dict[str, tuple[float, Request]] = {}
        self._answers: list[Answer] = []
        self._failure: Event | None = None
        self._reports = 0
        self._peak_bytes = 0
        self.info = start(engine, self._emit).models[0]

    def serve(self, arrivals: Arrivals) -> list[Answer]:
        """See ``ArrivalServer``."""
        with self._changed:
            self._run += 1
            self._began = time.monotonic()
            self._arrivals = arrivals
            self._answers = []
            while len(self._answers) < arrivals.count:
                for at, request in arrivals.until(time.monotonic() - self._began):
                    job = job_of(request, self.info, self._began + at, self._run)
                    job = replace(job, **self._options)
                    self._waiting[job.id] = at, request
                    self._engine.submit(job)
                moment = arrivals.next_at()
                self._changed.wait(
                    None if moment is None else max(0.0, self._began + moment - time.monotonic())
                )
                if self._failure is not None:
                    raise RuntimeError(
                        f"the engine did not generate the images of a request: {self._failure}"
                    )
            return self._answers

    def batch_times(self) -> list[tuple[int, float]]:
        """Rows and seconds of each batch since the previous call."""
        times, self._batch_times = self._batch_times, []
        return times

    def peak_bytes(self) -> int:
        """The most memory in use at once since the start, in bytes; waits for the next report.

        It is the engine's own figure, because the engine resets torch's peak for its measurements.
        Raises ``RuntimeError`` if the engine dies.
        """
        with self._changed:
            # The report in progress may have been read before the last image.
            wanted = self._reports + 2
            while self._reports < wanted:
                if self._failure is not None:
                    raise RuntimeError(f"the engine reports no memory: {self._failure}")
                self._changed.wait()
            return self._peak_bytes

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _emit(self, event: Event) -> None:
        now = time.monotonic() - self._began
        match event:
            case BatchDone():
                self._batch_times.append((event.rows, event.seconds))
            case JobFinished():
                with self._changed:
                    at, request = self._waiting.pop(event.job_id)
                    self._answers.append(Answer.of(request, at, now))
                    self._arrivals.answered(now)
                    self._changed.notify()
            case MemoryReport():
                with self._changed:
                    self._reports += 1
                    self._peak_bytes = max(self._peak_bytes, event.by_kind["peak"])
                    self._changed.notify()
            case JobFailed() | JobCancelled() | EngineDied():
                with self._changed:
                    self._failure = event
                    self._changed.notify()


def make_engine(
    config: EngineConfig, options: Mapping[str, Any] = NO_OPTIONS
) -> tuple[EnginePeer, ModelInfo]:
    """For ``Remote``."""
    peer = EnginePeer(ThreadEngine(config), options)
    return peer, peer.info
