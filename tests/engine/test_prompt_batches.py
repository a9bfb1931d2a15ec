"""Prompts of jobs that arrive together are encoded together, and fail alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.events import Counted, EncodeDone, JobFailed, JobFinished, SampleProgress
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.families.base import Model

from .conftest import End, LoopUnderTest, config_for, make_job
from .test_containment import assert_same_pictures
from .test_events import counted
from .tiny import write_tiny_model


def join_together(loop: LoopUnderTest, *jobs: Job, before: str = "before") -> dict[str, End]:
    """Let ``jobs`` join in one step, directly after a step of another job, ``before``."""

    def join(event: object) -> None:
        if isinstance(event, SampleProgress):  # Emitted during a step.
            loop.on_event = lambda _: None
            for job in jobs:
                loop.loop.submit(job)

    loop.on_event = join
    loop.run(make_job(before, prompt="a green square", steps=3))
    loop.wait_for(lambda: all(job.id in loop.ends for job in jobs))
    return {job.id: loop.ends[job.id] for job in jobs}


def replace_encoder(loop: LoopUnderTest, check: Callable[[list[str]], None]) -> list[list[str]]:
    """Call ``check`` with each batch of prompts first; returns the list of batches."""
    encoder = loop.models["tiny"].prompts
    encode, batches = encoder._encode, []

    def checked(texts: list[str]) -> Any:
        batches.append(texts)
        check(texts)
        return encode(texts)

    encoder._encode = checked  # type: ignore[method-assign]
    return batches


def newcomers(count: int) -> list[Job]:
    return [make_job(f"new-{i}", prompt=f"a red star {i}", seed=i) for i in range(count)]


def failure_of(end: End) -> Failure:
    assert isinstance(end, JobFailed)
    return end.failure


@pytest.mark.parametrize("exact", [False, True])
def test_a_prompt_that_breaks_fails_alone(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest, exact: bool
) -> None:
    def no_hearts(texts: list[str]) -> None:
        if "a heart" in texts:
            raise ValueError("injected: secret text")

    batches = replace_encoder(own_loop, no_hearts)
    others = newcomers(4)
    ends = join_together(own_loop, *others, make_job("bad", prompt="a heart", exact=exact))
    failure = failure_of(ends.pop("bad"))
    assert failure.reason is Reason.ENGINE_FAILED
    assert "secret" not in failure.message
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert any({other.prompt for other in others} <= set(texts) for texts in batches)
    assert_same_pictures(own_loop, shared_loop, others)


def test_prompts_that_fit_only_apart(own_loop: LoopUnderTest, shared_loop: LoopUnderTest) -> None:
    def at_most_two(texts: list[str]) -> None:
        if len(texts) > 2:
            raise torch.OutOfMemoryError("injected")

    batches = replace_encoder(own_loop, at_most_two)
    jobs = newcomers(4)
    ends = join_together(own_loop, *jobs)
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert max(map(len, batches)) == 4
    totals = counted(own_loop)
    assert totals[Counted.OUT_OF_MEMORY_SPLIT] == 1
    assert Counted.OUT_OF_MEMORY_FAILED not in totals
    # Four newcomers' prompts, and two of the job before: none is counted for having been tried.
    assert totals[Counted.PROMPTS_ENCODED] == 6
    assert_same_pictures(own_loop, shared_loop, jobs)


def test_a_prompt_that_does_not_fit_alone(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    def no_hearts(texts: list[str]) -> None:
        if "a heart" in texts:
            raise torch.OutOfMemoryError("injected")

    replace_encoder(own_loop, no_hearts)
    others = newcomers(3)
    ends = join_together(own_loop, *others, make_job("bad", prompt="a heart"))
    assert failure_of(ends.pop("bad")).reason is Reason.OUT_OF_MEMORY
    assert all(isinstance(end, JobFinished) for end in ends.values())
    totals = counted(own_loop)
    assert totals[Counted.OUT_OF_MEMORY_FAILED] == 1
    assert totals[Counted.OUT_OF_MEMORY_SPLIT] == 2  # Of four, then of two.
    assert_same_pictures(own_loop, shared_loop, others)


def test_a_device_lost_over_a_prompt_ends_the_loop(own_loop: LoopUnderTest) -> None:
    def lost(_: list[str]) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    replace_encoder(own_loop, lost)
    own_loop.loop.submit(make_job("any"))
    with pytest.raises(torch.AcceleratorError):
        own_loop.wait_for(lambda: False)


@pytest.mark.parametrize("write", [write_tiny_model, write_sdxl])
def test_the_time_of_an_encode_is_measured_and_reported(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    loop = LoopUnderTest(config_for(write(tmp_path)))
    try:
        model: Model = loop.models["tiny"]
        assert 0 < model.info.speed.encode < 10
        for name, prompt in (("new", "a heart"), ("cached", "a heart"), ("other", "a ring")):
            loop.run(make_job(name, prompt=prompt, scheduler=SchedulerName.EULER))
        encodes = [event for event in loop.events if isinstance(event, EncodeDone)]
        cached = model.prompt_cache_bytes
    finally:
        loop.close()
    assert len(encodes) == 2, "the cached prompts have no encode"
    assert all(encode.model == "tiny" and encode.seconds > 0 for encode in encodes)
    assert encodes[0].prompts >= encodes[1].prompts == 1
    assert 0 < encodes[0].cache_bytes < encodes[1].cache_bytes == cached


@pytest.mark.parametrize("write", [write_tiny_model, write_sdxl])
def test_the_cache_keeps_as_many_prompts_as_its_bytes_allow(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    folder = write(tmp_path)
    before, after = cache_bytes(folder, 10**9, ["a red star"])
    one = after - before
    assert one > 0
    prompts = ["a red star", "a blue ring", "a heart"]
    for most in (0, 1, 2):
        assert cache_bytes(folder, most * one + one // 2, prompts)[1] == most * one


def cache_bytes(folder: Path, most: int, prompts: list[str]) -> tuple[int, int]:
    """The bytes in a model's cache, before and after one job for each of ``prompts``."""
    loop = LoopUnderTest(config_for(folder, prompt_cache_bytes=most))
    try:
        model: Model = loop.models["tiny"]
        before = model.prompt_cache_bytes
        usual = {"scheduler": SchedulerName.EULER, "steps": 2, "guidance_scale": 1.0}
        loop.run(*(make_job(prompt, prompt=prompt, **usual) for prompt in prompts))
        return before, model.prompt_cache_bytes
    finally:
        loop.close()
