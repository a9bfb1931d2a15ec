"""What unfinished images hold in memory bounds how many of them are in the engine."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import (
    BatchDone,
    JobCancelled,
    JobFinished,
    RowLimitCorrected,
    SampleBytesCorrected,
)
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.residency import HEADROOM, resident_bytes
from darkroom_server.engine.batching.residency import Residency
from tests.server.jobs import make_job as plain_job

from .conftest import LoopUnderTest, config_for
from .test_batch_scheduler import FAILURE, Bench
from .test_suspended_pipelines import job

ROW = 1000


def held_model(room: int, id: str = "demo") -> ModelInfo:
    """Images of this model hold 100 bytes; ``room`` bytes are free beside a batch of 2 rows."""
    model = fake_model(id)
    memory = replace(
        model.memory,
        bytes_per_row=ROW,
        bytes_per_decode=ROW,
        bytes_per_sample=100,
        available_bytes=2 * ROW + room,
    )
    return replace(model, memory=memory, limits=replace(model.limits, max_rows=2))


def test_an_image_holds_its_prompts_and_grows_with_its_pixels() -> None:
    model = held_model(0)
    assert model.held_bytes(plain_job(guidance_scale=1.0)) == 100
    assert model.held_bytes(plain_job(guidance_scale=5.0)) == 200
    assert model.held_bytes(plain_job(guidance_scale=5.0, width=128)) == 400
    small = replace(model, memory=replace(model.memory, pixels=128 * 128))
    assert small.held_bytes(plain_job(guidance_scale=1.0)) == 100, "its prompt is as long"


def test_the_room_is_what_the_largest_batch_of_any_model_leaves() -> None:
    model, other = held_model(500), held_model(300, "other")
    assert resident_bytes([model]) == 500
    assert resident_bytes([model, other]) == 300
    assert resident_bytes([]) == 0


def test_the_room_is_at_least_what_the_images_of_the_largest_batch_hold() -> None:
    model = held_model(3 * ROW)
    assert resident_bytes([RowLimitCorrected("demo", 3).of(model)]) == 2 * ROW
    assert resident_bytes([RowLimitCorrected("demo", 64).of(model)]) == ROW, "4 rows fit"
    heavy = SampleBytesCorrected("demo", ROW).of(model)
    assert resident_bytes([RowLimitCorrected("demo", 64).of(heavy)]) == 3 * ROW, "2 rows fit"


def test_rows_leave_room_for_what_images_hold() -> None:
    needs = replace(held_model(0).memory, available_bytes=8 * ROW + 800)
    assert needs.rows_that_fit(64, 64) == 8, "each row holds 100 bytes too"
    assert needs.rows_that_fit(64, 64, held=0) == 8
    assert needs.rows_that_fit(64, 64, held=2000) == 6
    assert replace(needs, bytes_per_sample=1000).rows_that_fit(64, 64) == 4


def bench_with(room: int) -> Bench:
    return Bench(Residency({"demo": held_model(room)}))


def test_jobs_enter_in_their_order_while_their_images_fit() -> None:
    bench = bench_with(500)
    for id, images in (("a", 2), ("b", 3), ("c", 1)):
        bench.scheduler.add(plain_job(id, image_count=images, guidance_scale=1.0))
    assert bench.take() == ["a", "b"]
    assert bench.take() == []
    assert not bench.scheduler.idle
    bench.scheduler.cancel("a")
    assert bench.take() == ["c"]
    assert any(isinstance(event, JobCancelled) for event in bench.events)


def test_no_job_overtakes_one_that_waits_for_memory() -> None:
    bench = bench_with(500)
    for id, images in (("a", 3), ("large", 4), ("small", 1)):
        bench.scheduler.add(plain_job(id, image_count=images, guidance_scale=1.0))
    assert bench.take() == ["a"]
    bench.scheduler.fail("a", FAILURE)
    assert bench.take() == ["large", "small"]


def test_each_image_gives_its_memory_back_after_its_last_step() -> None:
    bench = bench_with(200)
    samples = bench.start("a", image_count=2, guidance_scale=1.0)
    bench.scheduler.add(plain_job("b", guidance_scale=1.0))
    assert bench.take() == []
    bench.scheduler.denoised(samples[0], 0.0)  # type: ignore[arg-type]
    assert bench.take() == ["b"]


def test_a_job_alone_enters_an_empty_engine() -> None:
    bench = bench_with(100)
    for id in ("a", "b"):
        bench.scheduler.add(plain_job(id, image_count=4, guidance_scale=1.0))
    assert bench.take() == ["a"]
    bench.scheduler.cancel("a")
    assert bench.take() == ["b"]


def test_more_than_was_measured_corrects_the_measurement() -> None:
    residency = Residency({"demo": held_model(1000)})
    guided = plain_job("a", guidance_scale=5.0, image_count=2)
    residency.enter(guided)
    assert residency.record(guided, 200) is None
    assert residency.held_bytes == 400
    assert residency.record(guided, 300) == SampleBytesCorrected("demo", round(150 * HEADROOM))
    assert residency.held_bytes == 2 * 330
    assert residency.record(guided, 310) is None, "within the headroom"
    assert residency.has_room(plain_job("b", guidance_scale=5.0, image_count=1))
    assert not residency.has_room(plain_job("c", guidance_scale=5.0, image_count=2))
    residency.leave("a")
    assert residency.held_bytes == 0


@pytest.fixture
def ballast(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each run of SDXL holds in addition; the list has one number, to change."""
    extra = [2**20]
    generate = diffusers.StableDiffusionXLPipeline.__call__

    @functools.wraps(generate)
    def holding(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = torch.zeros(extra[0], dtype=torch.uint8)
        result = generate(self, *args, **kwargs)
        assert not held.any()
        return result

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "__call__", holding)
    return extra


@pytest.fixture
def loop(tmp_path: Path, ballast: list[int]) -> Iterator[LoopUnderTest]:
    made = LoopUnderTest(config_for(write_sdxl(tmp_path)))
    yield made
    made.close()


def limit_images(loop: LoopUnderTest, images: int) -> int:
    """Leave room for what ``images`` images without guidance hold; returns their bytes."""
    residency = loop.loop._residency
    info = residency._models["tiny"]
    room = images * info.memory.bytes_per_sample
    batch = info.memory.needed(info.defaults.width, info.defaults.height, rows=2)
    memory = replace(info.memory, available_bytes=batch + room)
    limits = replace(info.limits, max_rows=2)
    residency._models["tiny"] = replace(info, memory=memory, limits=limits)
    return room


def watch(loop: LoopUnderTest) -> list[tuple[int, int]]:
    """At each batch: the images in the engine, and the bytes that they really hold."""
    found: list[tuple[int, int]] = []

    def count(event: object) -> None:
        if isinstance(event, BatchDone):
            samples: list[Any] = [
                sample
                for waiting in loop.loop._scheduler._samples.values()
                for sample in waiting.values()
            ]
            found.append((len(samples), sum(sample.held_bytes() for sample in samples)))

    loop.on_event = count
    return found


def run_many(loop: LoopUnderTest) -> None:
    jobs = [job("many", steps=3 + i % 3, guidance_scale=1.0, seed=i) for i in range(9)]
    jobs.append(job("two", image_count=2, guidance_scale=1.0))
    jobs.append(job("guided", guidance_scale=5.0))
    ends = loop.run(*jobs)
    assert all(isinstance(end, JobFinished) for end in ends.values())


def test_images_never_hold_more_than_fits_and_all_jobs_finish(loop: LoopUnderTest) -> None:
    assert loop.models["tiny"].info.memory.bytes_per_sample > 2**20
    room = limit_images(loop, 3)
    found = watch(loop)
    run_many(loop)
    assert max(images for images, _ in found) == 3
    assert 2 * room / 3 < max(held for _, held in found) <= room
    assert loop.loop._residency.held_bytes == 0
    assert not any(isinstance(event, SampleBytesCorrected) for event in loop.events)


def test_with_room_all_jobs_are_there_at_once(loop: LoopUnderTest) -> None:
    found = watch(loop)
    run_many(loop)
    assert max(images for images, _ in found) > 3


def test_images_that_hold_more_than_at_the_start_are_fewer(
    loop: LoopUnderTest, ballast: list[int]
) -> None:
    room = limit_images(loop, 6)
    ballast[0] *= 3
    loop.run(job("first", guidance_scale=1.0))
    corrected = [event for event in loop.events if isinstance(event, SampleBytesCorrected)]
    assert len(corrected) == 1
    assert 3 * 2**20 < corrected[0].bytes_per_sample < 4 * 2**20
    found = watch(loop)
    run_many(loop)
    assert 1 <= max(images for images, _ in found) <= 2
    assert max(held for _, held in found) <= room
