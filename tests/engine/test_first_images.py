"""The first image of a model on a GPU, which the engine generates before a caller waits for one."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import Event, ImageReady, JobFinished
from darkroom_server.core.model_events import ModelLoaded
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.failures import DECODE_FAILED
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.sample import Sample

from .conftest import End, config_for, make_job
from .fake_cuda import FakeDevice
from .test_gpu_path import on_gpu
from .test_weight_store import OnDevice, on_this_thread

__all__ = ["on_this_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = ["batch of 2", "preview", "batch of 2", "decode"]
"""Everything that an image needs of the device, in order."""


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What loops ran, in order."""
    found: list[str] = []
    run, decode, preview = Runner.run, Runner.decode, Runner.preview

    def noted_run(self: Runner, batch: Batch) -> BatchResult:
        found.append(f"batch of {batch.rows}")
        return run(self, batch)

    def noted_preview(self: Runner, sample: Sample) -> Any:
        pixels = preview(self, sample)
        if pixels is not None:
            found.append("preview")
        return pixels

    def noted_decode(self: Runner, sample: Sample) -> Any:
        found.append("decode")
        return decode(self, sample)

    monkeypatch.setattr(Runner, "run", noted_run)
    monkeypatch.setattr(Runner, "preview", noted_preview)
    monkeypatch.setattr(Runner, "decode", noted_decode)
    return found


def test_a_gpu_generates_an_image_before_it_is_ready(
    tiny_folder: Path, cuda: FakeDevice, work: list[str]
) -> None:
    events: list[Event] = []
    with structlog.testing.capture_logs() as lines:
        loop, ready = start_loop(on_gpu(tiny_folder, Preset.FAST), events.append)
    assert ready.models[0].runtime.device == "cuda:0"
    assert work == WHOLE
    assert not [e for e in events if isinstance(e, ImageReady | End)], "nobody asked for it"
    assert [line["event"] for line in lines].count("first images generated") == 1
    # Its loop is not that of the callers.
    assert loop._scheduler.idle


def test_a_cpu_generates_none(tiny_folder: Path, work: list[str]) -> None:
    start_loop(config_for(tiny_folder), lambda _: None)
    assert work == []


def test_a_first_image_that_fails_is_logged_and_the_model_is_served(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[End] = []

    def emit(event: Event) -> None:
        if isinstance(event, End):
            ends.append(event)
            loop.close()

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(Runner, "decode", lambda *_: DECODE_FAILED)
        loop, _ = start_loop(on_gpu(tiny_folder, Preset.FAST), emit)
    (line,) = (line for line in lines if line["event"] == "the first image failed")
    assert (line["log_level"], line["model"]) == ("error", "tiny")
    assert line["why"] == DECODE_FAILED.message
    loop.submit(make_job("asked", steps=2))
    loop.run()
    assert [type(end) for end in ends] == [JobFinished]


@pytest.mark.usefixtures("on_this_thread")
def test_a_model_that_is_loaded_beside_jobs_generates_one_too(
    tiny_folder: Path, cuda: FakeDevice, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of at most one batch, between which the jobs of other models go on."""
    models = OnDevice(cuda, Preset.FAST, tiny=tiny_folder)
    assert work == []
    load_slice = type(models.resident).work

    def noted(self: Any) -> None:
        work.append("slice")
        load_slice(self)

    monkeypatch.setattr(type(models.resident), "work", noted)
    models.load("tiny", keep=False)
    assert [each for each in work if each != "slice"] == WHOLE
    slices = [part.count("batch") for part in " ".join(work).split("slice")]
    assert [batches for batches in slices if batches] == [1, 1], work
    assert sum(isinstance(event, ModelLoaded) for event in models.events) == 1
    assert not [e for e in models.events if isinstance(e, ImageReady | JobFinished)]
