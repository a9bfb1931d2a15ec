"""Images of different sizes share batches, if the family's denoiser takes them together."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from bench.tiny_families.z_image import write_z_image
from darkroom_server.core.events import BatchDone, JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.batch import common_square

from .conftest import LoopUnderTest, config_for, make_job


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopUnderTest]:
    torch.set_num_threads(1)
    loop = LoopUnderTest(config_for(write_z_image(tmp_path_factory.mktemp("z-image"))))
    yield loop
    loop.close()


def batches_of(loop: LoopUnderTest, *sizes: tuple[int, int]) -> list[BatchDone]:
    """The batches of jobs of these sizes, which arrive together and differ in nothing else."""
    known = len(loop.events)
    jobs = [
        make_job(
            f"{sizes}-{i}",
            width=width,
            height=height,
            steps=3,
            scheduler=SchedulerName.MODEL,
        )
        for i, (width, height) in enumerate(sizes)
    ]
    ends = loop.run(*jobs)
    assert all(isinstance(end, JobFinished) for end in ends.values()), ends
    return [event for event in loop.events[known:] if isinstance(event, BatchDone)]


def test_similar_sizes_share_a_batch_which_reports_the_largest(z_image: LoopUnderTest) -> None:
    batches = batches_of(z_image, (96, 128), (112, 112))
    shared = [batch for batch in batches if batch.samples == 2]
    assert len(shared) >= 2
    assert {(batch.width, batch.height) for batch in shared} == {(112, 112)}


def test_sizes_far_apart_share_none(z_image: LoopUnderTest) -> None:
    batches = batches_of(z_image, (64, 64), (128, 128))
    assert {batch.samples for batch in batches} == {1}
    assert {(batch.width, batch.height) for batch in batches} == {(64, 64), (128, 128)}


def test_the_row_limit_holds_for_every_size_that_may_join(
    z_image: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = z_image.row_limits
    tight = replace(limits.memory, available_bytes=limits.memory.bytes_per_row * 5 // 2)
    assert (tight.rows_that_fit(128, 128), tight.rows_that_fit(96, 112)) == (2, 3)
    monkeypatch.setattr(limits, "memory", tight)
    assert batches_of(z_image, (96, 112))[0].max_rows == 2


def test_other_families_do_not_mix_sizes(tmp_path: Path) -> None:
    loop = LoopUnderTest(config_for(write_sdxl(tmp_path)))
    try:
        assert {batch.samples for batch in batches_of(loop, (64, 64), (56, 64))} == {1}
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(1, 1, 1), (1024, 1024, 1024), (1152, 896, 1024), (1024, 1025, 1536), (512, 768, 768)],
)
def test_the_common_square_has_as_many_pixels(width: int, height: int, side: int) -> None:
    assert common_square(width, height) == side
