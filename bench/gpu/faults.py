"""Real faults of a GPU: its memory ends, or a kernel fails an assertion."""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch

from bench.gpu import failing_engine
from bench.gpu.phases import Figures, Plan
from bench.inprocess.engine import job_of
from bench.inprocess.loop import pixels_of
from bench.workload.requests import Request
from darkroom_server.backends import process
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.engine_config import EngineConfig, Preset
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import (
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobTaken,
)
from darkroom_server.core.job import ImageFormat, Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoaded, ModelNotLoaded
from darkroom_server.core.quantization import Quantization, Quantize
from darkroom_server.dispatch import Dispatcher
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.ipc.commands import LoadModel

REQUEST = Request(0, "a large yellow star on a blue background", 4, 5.0, seed=7)
ROWS = 4


class FaultNotContained(RuntimeError):
    """A fault had other effects than it should have."""


@dataclass(slots=True)
class _Shortage:
    """Generates an image while there is memory, while there is none, and when it is back.

    What comes next follows from the events of ``loop``. Two models have the same files; ``second``
    is in the catalogue, in a format of its own, so that it shares no weights. It is loaded without
    memory, and again with it.
    """

    plan: Plan
    second: LoadModel
    loop: EngineLoop = field(init=False)
    large: Job = field(init=False)
    small: Job = field(init=False)
    events: list[Event] = field(default_factory=list)
    ballast: torch.Tensor | None = None

    def begin(self, loop: EngineLoop, info: ModelInfo) -> None:
        """Submit the first job; the events lead to the others."""
        self.loop = loop
        self.small = _job(info)
        side = min(info.limits.max_size, 2 * info.defaults.width)
        self.large = replace(self.small, id="large", width=side, height=side)
        loop.submit(self.small)

    def emit(self, event: Event) -> None:
        """Do what comes after ``event``."""
        self.events.append(event)
        match event:
            case JobFinished(job_id="small"):
                self.loop.submit(self.large)
            case JobTaken(job_id="large"):
                self._take_memory()
            case JobFailed(job_id="large"):
                self.loop.change_models(self.second)
            case ModelNotLoaded() if self.ballast is not None:
                self._give_memory_back()
                self.loop.submit(replace(self.small, id="after"))
            case JobFinished(job_id="after"):
                self.loop.change_models(self.second)
            case ModelLoaded():
                id = event.info.id
                self.loop.submit(replace(self.small, id=id, model=id))
            case JobFinished() | JobFailed() | JobCancelled() | ModelNotLoaded():
                self.loop.close()

    def _take_memory(self) -> None:
        """All of the device's but ``spare_bytes``, as another program could."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        size = max(0, free - self.plan.spare_bytes)
        self.ballast = torch.empty(size, dtype=torch.uint8, device=self.plan.torch_device)

    def _give_memory_back(self) -> None:
        self.ballast = None
        torch.cuda.empty_cache()


def out_of_memory(plan: Plan) -> Iterator[Figures]:
    """A job and a load do not fit; later ones do. Raises ``FaultNotContained``."""
    source = plan.sd14_source()
    other = replace(source, id="second", quantize=Quantize(Quantization.FP8))
    config = plan.config(source, catalogue=(other,), preset=Preset.FAST, rows=ROWS)
    shortage = _Shortage(plan, LoadModel(other))
    loop, ready = start_loop(config, shortage.emit)
    shortage.begin(loop, ready.models[0])
    loop.run()
    shortage.ballast = None
    failed = next((e for e in shortage.events if isinstance(e, JobFailed)), None)
    not_loaded = next((e for e in shortage.events if isinstance(e, ModelNotLoaded)), None)
    images = {
        event.job_id: pixels_of(event).tobytes()
        for event in shortage.events
        if isinstance(event, ImageReady)
    }
    figures: Figures = {
        "job": failed.failure.reason if failed else "",
        "load": not_loaded is not None and not_loaded.out_of_memory,
        "same_image_after": "after" in images and images["after"] == images.get("small"),
        "loaded_after": "second" in images,
    }
    yield figures
    _require(
        {
            "the large job failed for memory": failed is not None
            and (failed.job_id, failed.failure.reason) == ("large", Reason.OUT_OF_MEMORY),
            "the load failed for memory": figures["load"],
            "the next image is the same as before": figures["same_image_after"],
            "the second model makes an image": figures["loaded_after"],
        }
    )


def device_assert(plan: Plan) -> Iterator[Figures]:
    """An engine's process loses its device, and another one makes the image.

    Raises ``FaultNotContained``.
    """
    source = plan.demo_source()
    config = plan.config(source, preset=Preset.FAST, rows=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fail"
        with (
            patch.object(process, "CHILD", failing_engine.CHILD),
            patch.dict(os.environ, failing_engine.environment(file)),
        ):
            figures = asyncio.run(_lose_an_engine(config, file.touch))
    yield figures
    _require(
        {
            "the engine died once": figures["restarts"] == 1,
            "its process was replaced": figures["replaced"],
            "the image is the same as before": figures["same_image_after"],
        }
    )


async def _lose_an_engine(config: EngineConfig, fail_next: Callable[[], None]) -> Figures:
    engine = ProcessEngine(config)
    (source,) = config.models
    dispatcher = Dispatcher([engine], [source.id], max_queued_jobs=8, max_resident_samples=8)
    dispatcher.start()
    try:
        await dispatcher.loaded()
        job = _job(dispatcher.availability.model(source.id))
        before = (await dispatcher.submit(job).result()).images[0]
        first = engine.pid
        fail_next()
        began = time.monotonic()
        after = (await dispatcher.submit(replace(job, id="again")).result()).images[0]
        (status,) = dispatcher.snapshot().engines
        return {
            "restarts": status.restarts,
            "replaced": engine.pid != first,
            "seconds": time.monotonic() - began,
            "same_image_after": after.replay.pixels_sha256 == before.replay.pixels_sha256,
        }
    finally:
        await dispatcher.close()


def _job(info: ModelInfo) -> Job:
    job = job_of(REQUEST, info, time.monotonic())
    return replace(job, id="small", exact=True, format=ImageFormat.RAW_RGB)


def _require(facts: dict[str, bool]) -> None:
    if missing := [text for text, is_so in facts.items() if not is_so]:
        raise FaultNotContained(f"not so: {'; '.join(missing)}")
