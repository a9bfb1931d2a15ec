"""One contract, whatever the engine: on a thread, in a process of its own, or a fake."""

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine import Engine
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.events import (
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFinished,
    JobStarted,
    JobTaken,
    SampleProgress,
)
from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.core.model_events import ModelLoaded, ModelsDescribed, ModelUnloaded

from .conftest import config_for, make_job

KINDS = ["thread", "process", "fake"]


class Listener:
    """Collects an engine's events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.seen: list[Event] = []
        engine.start(self.events.put)

    def until(self, wanted: Callable[[Event], bool], timeout: float = 180) -> Event:
        """The next event that is ``wanted``."""
        while True:
            event = self.events.get(timeout=timeout)
            self.seen.append(event)
            if wanted(event):
                return event

    def until_end_of(self, *job_ids: str) -> None:
        remaining = set(job_ids)
        while remaining:
            event = self.until(lambda e: getattr(e, "job_id", None) in remaining and is_end(e))
            remaining.discard(event.job_id)  # type: ignore[union-attr]

    def of(self, job_id: str, kind: type[Any] | None = None) -> list[Any]:
        return [
            e
            for e in self.seen
            if getattr(e, "job_id", None) == job_id and (kind is None or isinstance(e, kind))
        ]


def is_end(event: Event) -> bool:
    return type(event).__name__ in ("JobFinished", "JobFailed", "JobCancelled")


def build(kind: str, config: EngineConfig) -> Engine:
    if kind == "thread":
        return ThreadEngine(config)
    if kind == "process":
        return ProcessEngine(config)
    return FakeEngine((fake_model("tiny"),), pass_seconds=0.002)


@pytest.fixture(params=KINDS, scope="module")
def listener(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Listener]:
    listener = Listener(build(request.param, config_for(tiny_folder)))
    ready = listener.until(lambda e: isinstance(e, EngineReady | EngineDied))
    assert isinstance(ready, EngineReady)
    assert len(ready.models) == 1
    yield listener
    listener.engine.close()


def test_a_job_emits_its_events_in_order(listener: Listener) -> None:
    job = make_job("whole", image_count=2, steps=4)
    listener.engine.submit(job)
    listener.until_end_of("whole")
    events = listener.of("whole")
    assert [type(event) for event in events[:2]] == [JobTaken, JobStarted]
    assert isinstance(events[-1], JobFinished)
    assert len(listener.of("whole", JobStarted)) == 1
    for index in range(2):
        steps = [e.step for e in listener.of("whole", SampleProgress) if e.image_index == index]
        assert steps == list(range(1, 5))
    images = {e.image_index: e.image for e in listener.of("whole", ImageReady)}
    assert [images[i].seed for i in range(2)] == [job.seed, job.seed + 1]
    assert all(len(image.data) == 64 * 64 * 3 for image in images.values())
    stages = events[-1].stages
    for stage in ("queue", "encode_prompt", "denoise", "decode", "encode_image"):
        assert getattr(stages, stage) >= 0


def test_many_jobs_each_end_once(listener: Listener) -> None:
    jobs = [make_job(f"many-{i}", seed=i, steps=3 + i % 4) for i in range(12)]
    for job in jobs:
        listener.engine.submit(job)
    listener.until_end_of(*(job.id for job in jobs))
    for job in jobs:
        assert [type(e) for e in listener.of(job.id) if is_end(e)] == [JobFinished]


def test_the_same_seed_generates_the_same_bytes(listener: Listener) -> None:
    for id in ("first", "second"):
        listener.engine.submit(make_job(id, exact=True))
        listener.until_end_of(id)
    first, second = (listener.of(id, ImageReady)[0].image for id in ("first", "second"))
    assert first.data == second.data
    assert first.replay.pixels_sha256 == second.replay.pixels_sha256


def test_a_cancelled_job_ends(listener: Listener) -> None:
    listener.engine.submit(make_job("gone", steps=150))
    listener.until(lambda e: isinstance(e, SampleProgress) and e.job_id == "gone")
    listener.engine.cancel("gone")
    listener.until_end_of("gone")
    (end,) = [e for e in listener.of("gone") if is_end(e)]
    assert isinstance(end, JobCancelled)
    assert not end.expired
    assert not listener.of("gone", ImageReady)


def test_cancelling_an_unknown_or_ended_job_is_ignored(listener: Listener) -> None:
    listener.engine.cancel("never-was")
    listener.engine.submit(make_job("bystander"))
    listener.until_end_of("bystander")
    assert isinstance(listener.of("bystander")[-1], JobFinished)
    listener.engine.cancel("bystander")


@pytest.mark.parametrize("listener", ["thread", "process"], indirect=True)
def test_an_expired_job_is_cancelled(listener: Listener) -> None:
    listener.engine.submit(make_job("late", steps=150, deadline=time.monotonic() + 0.1))
    listener.until_end_of("late")
    (end,) = [e for e in listener.of("late") if is_end(e)]
    assert isinstance(end, JobCancelled)
    assert end.expired


def test_models_that_are_added_are_described_and_loaded(
    listener: Listener, tiny_folder: Path
) -> None:
    engine = listener.engine
    missing = ModelSource(id="missing", location=str(tiny_folder / "nowhere"))
    engine.describe_models([ModelSource(id="more", location=str(tiny_folder)), missing])
    described = listener.until(lambda e: isinstance(e, ModelsDescribed))
    assert isinstance(described, ModelsDescribed)
    more, other = described.descriptions
    assert (more.id, other.id) == ("more", "missing")
    assert more.info is not None
    assert (more.info.id, more.info.revision, more.reason) == ("more", "", "")
    assert more.stamp == stamp_of(tiny_folder)
    assert not other.stamp
    engine.load_model("more")
    assert isinstance(listener.until(lambda e: isinstance(e, ModelLoaded)), ModelLoaded)
    engine.submit(make_job("of more", model="more"))
    listener.until_end_of("of more")
    assert isinstance(listener.of("of more")[-1], JobFinished)
    engine.unload_model("more")
    listener.until(lambda e: isinstance(e, ModelUnloaded))
    engine.forget_models(["more", "missing"])


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_model_that_cannot_be_loaded_is_one_line(kind: str, tmp_path: Path) -> None:
    config = EngineConfig(models=(ModelSource(id="none", location=str(tmp_path)),), device="cpu")
    listener = Listener(build(kind, config))
    died = listener.until(lambda e: isinstance(e, EngineDied))
    assert isinstance(died, EngineDied)
    assert "has no model_index.json" in died.message
    assert "\n" not in died.message
    listener.engine.close()


def test_close_ends_it_with_jobs_inside(listener: Listener) -> None:
    """The last test: it closes the shared engine."""
    listener.engine.submit(make_job("inside", steps=150))
    listener.until(lambda e: isinstance(e, JobStarted) and e.job_id == "inside")
    listener.engine.close()
    listener.engine.close()
    while not listener.events.empty():
        assert not is_end(listener.events.get())
