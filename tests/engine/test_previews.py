"""Previews show the unfinished image, and change nothing of it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import darkroom_server
from darkroom_server.core.events import JobFinished, PreviewReady
from darkroom_server.core.job import ImageFormat, SchedulerName

from .conftest import LoopUnderTest, config_for, make_job
from .test_schedulers import SD_SCHEDULERS

DEMO = Path(darkroom_server.__file__).parent / "demo_model"


def previews(loop: LoopUnderTest, job_id: str) -> list[PreviewReady]:
    return [e for e in loop.events if isinstance(e, PreviewReady) and e.job_id == job_id]


@pytest.fixture(scope="module")
def demo_loop() -> Iterator[LoopUnderTest]:
    loop = LoopUnderTest(config_for(DEMO))
    yield loop
    loop.close()


def colours(picture: Image.Image) -> NDArray[np.float32]:
    """The colours of a picture at 16 × 16."""
    return np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float32)


@pytest.mark.parametrize("scheduler", SD_SCHEDULERS)
def test_they_change_no_byte_of_the_image(
    shared_loop: LoopUnderTest, scheduler: SchedulerName
) -> None:
    plain = make_job(f"plain-{scheduler}", scheduler=scheduler, exact=True, steps=8)
    shown = make_job(
        f"shown-{scheduler}", scheduler=scheduler, exact=True, steps=8, preview_every=1
    )
    ends = shared_loop.run(plain, shown)
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert not previews(shared_loop, plain.id)
    assert shared_loop.image(plain.id).image.data == shared_loop.image(shown.id).image.data
    found = previews(shared_loop, shown.id)
    assert found
    calls = shared_loop.progress(shown.id)[-1].steps
    assert {e.step for e in found} <= set(range(1, calls))


@pytest.mark.parametrize("format", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_they_come_every_n_steps_and_not_after_the_last(
    shared_loop: LoopUnderTest, format: ImageFormat
) -> None:
    job = make_job(
        f"every-{format}",
        steps=9,
        width=128,
        height=64,
        image_count=2,
        preview_every=3,
        preview_format=format,
    )
    shared_loop.run(job)
    for index in range(2):
        found = [e for e in previews(shared_loop, job.id) if e.image_index == index]
        steps = [e.step for e in found]
        # One is skipped if the previous one is still being encoded.
        assert set(steps) <= {3, 6}
        assert 3 in steps
        for preview in found:
            picture = Image.open(io.BytesIO(preview.data))
            assert picture.size == (preview.width, preview.height) == (128, 64)
            assert picture.format == format.name


@pytest.mark.parametrize(
    "scheduler", [SchedulerName.DDIM, SchedulerName.EULER, SchedulerName.DPMPP_2M_KARRAS]
)
def test_halfway_the_scene_is_there(demo_loop: LoopUnderTest, scheduler: SchedulerName) -> None:
    job = make_job(
        f"halfway-{scheduler}",
        model="tiny",
        width=128,
        height=128,
        steps=20,
        preview_every=10,
        format=ImageFormat.PNG,
        scheduler=scheduler,
    )
    demo_loop.run(job)
    (preview,) = previews(demo_loop, job.id)
    assert preview.step == 10
    shown = colours(Image.open(io.BytesIO(preview.data)))
    final = colours(Image.open(io.BytesIO(demo_loop.image(job.id).image.data)))
    assert np.corrcoef(shown.ravel(), final.ravel())[0, 1] > 0.9


def test_a_model_without_previews_still_generates(own_loop: LoopUnderTest) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no encoder")

    previewer = own_loop.models["tiny"].previewer
    assert previewer is not None
    previewer._vae = type("Broken", (), {"parameters": broken})()
    previewer._projection = None  # As if it could not be fitted at load.
    ends = own_loop.run(make_job("blind", preview_every=1), make_job("other", preview_every=1))
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert not previews(own_loop, "blind")


def test_running_out_of_memory_once_skips_one_preview(own_loop: LoopUnderTest) -> None:
    previewer = own_loop.models["tiny"].previewer
    assert previewer is not None
    previewer._projection = None  # As without memory at load.
    fit = previewer._fit

    def too_much() -> torch.Tensor:
        previewer._fit = fit  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("injected")

    previewer._fit = too_much  # type: ignore[method-assign]
    own_loop.run(make_job("first", preview_every=3, steps=6))
    assert not previews(own_loop, "first")
    own_loop.run(make_job("second", preview_every=3, steps=6))
    assert [e.step for e in previews(own_loop, "second")] == [3]


def test_with_a_safety_checker_there_are_no_previews(own_loop: LoopUnderTest) -> None:
    class Strict:
        def flags(self, _: object) -> bool:
            return True

    own_loop.models["tiny"].safety = Strict()  # type: ignore[assignment]
    own_loop.run(make_job("hidden", preview_every=1))
    assert own_loop.image("hidden").image.flagged
    assert not previews(own_loop, "hidden")
