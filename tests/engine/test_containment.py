"""Containment: a failure of one sample fails only its own job."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import (
    BatchDone,
    Counted,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
    StageSeconds,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.batching import row_limits
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.components.prompt_encoder import PromptKey
from darkroom_server.engine.latent_sample import LinearSample

from .conftest import LoopUnderTest, config_for, make_job
from .test_events import counted


def crowd(count: int, prefix: str, **fields: Any) -> list[Job]:
    return [make_job(f"{prefix}-{i}", seed=i, steps=5 + i, **fields) for i in range(count)]


def pixels(loop: LoopUnderTest, job: Job) -> np.ndarray:
    return np.frombuffer(loop.image(job.id).image.data, np.uint8).astype(int)


def assert_same_pictures(loop: LoopUnderTest, undisturbed: LoopUnderTest, jobs: list[Job]) -> None:
    """Equal up to one level of 255: batches of other sizes change the last bits."""
    undisturbed.run(*jobs)
    for job in jobs:
        assert np.abs(pixels(loop, job) - pixels(undisturbed, job)).max() <= 1


def replace_unet(loop: LoopUnderTest, wrap: Callable[..., Any]) -> None:
    """Replace the denoiser's network by ``wrap(original, latents, ...)``."""
    model = loop.models["tiny"]
    original = model.unet
    model.unet = lambda sample, **kwargs: wrap(original, sample, **kwargs)


def test_out_of_memory_splits_the_batch(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    widest = []

    def above_four_rows(original: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if latents.shape[0] > 4:
            raise torch.OutOfMemoryError("injected")
        widest.append(latents.shape[0])
        return original(latents, *args, **kwargs)

    replace_unet(own_loop, above_four_rows)
    jobs = crowd(8, "oom")
    ends = own_loop.run(*jobs)
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert max(widest) <= 4
    batches = [event for event in own_loop.events if isinstance(event, BatchDone)]
    assert batches[-1].max_rows <= 4
    assert_same_pictures(own_loop, shared_loop, jobs)


def test_a_reduced_row_limit_is_raised_again_after_a_while(
    own_loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_limits, "RECOVERY_BATCHES", 3)
    full = True

    def above_two_rows(original: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if full and latents.shape[0] > 2:
            raise torch.OutOfMemoryError("injected")
        return original(latents, *args, **kwargs)

    replace_unet(own_loop, above_two_rows)
    own_loop.row_limits.max_rows = 8
    own_loop.run(make_job("while it is full", image_count=4, steps=2))
    full = False
    own_loop.run(make_job("later", image_count=4, steps=20))
    limits = [e.max_rows for e in own_loop.events if isinstance(e, BatchDone)]
    assert sorted(set(limits)) == [2, 4, 8]
    assert limits[-1] == 8


def test_large_images_that_do_not_fit_do_not_reduce_the_limit_of_small_ones(
    own_loop: LoopUnderTest,
) -> None:
    def large_in_fours(original: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if latents.shape[-1] > 8 and latents.shape[0] > 4:
            raise torch.OutOfMemoryError("injected")
        return original(latents, *args, **kwargs)

    replace_unet(own_loop, large_in_fours)
    own_loop.row_limits.max_rows = 16
    own_loop.run(make_job("large", width=128, image_count=4), make_job("small", image_count=4))
    batches = [event for event in own_loop.events if isinstance(event, BatchDone)]
    of_size = {width: [b for b in batches if b.width == width] for width in (64, 128)}
    assert {b.rows for b in of_size[64]} == {8}
    assert {b.max_rows for b in of_size[64]} == {16}
    assert of_size[128][-1].max_rows == 4


def test_out_of_memory_alone_fails_alone(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    def guided_never_fits(original: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if latents.shape[0] > 1:
            raise torch.OutOfMemoryError("injected")
        return original(latents, *args, **kwargs)

    replace_unet(own_loop, guided_never_fits)
    small = crowd(3, "unguided", guidance_scale=1.0)
    ends = own_loop.run(make_job("guided"), *small)
    failed = ends["guided"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.OUT_OF_MEMORY
    assert "smaller" in failed.failure.message
    assert_same_pictures(own_loop, shared_loop, small)


def test_a_broken_batch_fails_only_the_poison_job(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    poison = make_job("poison", prompt="a black heart", steps=9)
    key = PromptKey("a black heart", alone=False)

    def breaks(original: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = own_loop.models["tiny"].prompts.encode([key])
        for row in kwargs["encoder_hidden_states"]:
            if torch.equal(row, cache[key].hidden[0]):
                raise ValueError("injected: secret text")
        return original(latents, *args, **kwargs)

    replace_unet(own_loop, breaks)
    others = crowd(4, "others")
    ends = own_loop.run(poison, *others)
    failed = ends["poison"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.ENGINE_FAILED
    assert "secret" not in failed.failure.message
    assert_same_pictures(own_loop, shared_loop, others)


def test_a_scheduler_that_raises_fails_its_sample(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = LinearSample.begin_step

    def third_step_raises(self: LinearSample, prediction: torch.Tensor) -> Any:
        if self.job.id == "doomed" and self.step == 2:
            raise IndexError("injected")
        return begin(self, prediction)

    monkeypatch.setattr(LinearSample, "begin_step", third_step_raises)
    others = crowd(4, "neighbours")
    ends = own_loop.run(make_job("doomed", scheduler=SchedulerName.UNIPC), *others)
    failed = ends["doomed"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.SCHEDULER_FAILED
    assert len(own_loop.progress("doomed")) == 2
    assert_same_pictures(own_loop, shared_loop, others)


def test_a_scheduler_without_memory_says_so(
    own_loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = LinearSample.begin_step

    def does_not_fit(self: LinearSample, prediction: torch.Tensor) -> Any:
        if self.job.id == "doomed":
            raise torch.OutOfMemoryError("injected")
        return begin(self, prediction)

    monkeypatch.setattr(LinearSample, "begin_step", does_not_fit)
    ends = own_loop.run(make_job("doomed", image_count=2), make_job("other"))
    failed = ends["doomed"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.OUT_OF_MEMORY
    assert isinstance(ends["other"], JobFinished)
    assert counted(own_loop)[Counted.OUT_OF_MEMORY_FAILED] == 1


def test_non_finite_decode_is_tried_in_float32(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    decoder = own_loop.models["tiny"].decoder
    decode = decoder._decode
    decoder._decode = lambda latents, **_: decode(latents) * float("nan")  # type: ignore[method-assign]
    job = make_job("recovered")
    assert isinstance(own_loop.run(job)[job.id], JobFinished)
    assert_same_pictures(own_loop, shared_loop, [job])


def test_without_memory_for_float32_the_weights_stay_as_they_are(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LoopUnderTest(config_for(tiny_folder, dtype=Dtype.BFLOAT16))
    try:
        decoder = loop.models["tiny"].decoder
        decode = decoder._decode

        def to_half_of_it(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.decoder.to(*args, **kwargs)
            raise torch.OutOfMemoryError("injected")

        decoder._decode = lambda latents, **_: decode(latents) * float("nan")  # type: ignore[method-assign]
        monkeypatch.setattr(AutoencoderKL, "to", to_half_of_it)
        failed = loop.run(make_job("first"))["first"]
        assert isinstance(failed, JobFailed)
        assert failed.failure.reason is Reason.OUT_OF_MEMORY
        assert {weight.dtype for weight in decoder._vae.parameters()} == {torch.bfloat16}
        monkeypatch.undo()
        assert isinstance(loop.run(make_job("second"))["second"], JobFinished)
        assert {weight.dtype for weight in decoder._vae.parameters()} == {torch.bfloat16}
    finally:
        loop.close()


def test_non_finite_latents_fail_and_give_no_black_image(
    own_loop: LoopUnderTest, shared_loop: LoopUnderTest
) -> None:
    poison = PromptKey("not a number", alone=False)

    def poisons_its_rows(original: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = own_loop.models["tiny"].prompts.encode([poison])[poison].hidden[0]
        predicted = original(*args, **kwargs)[0].clone()
        for row, context in zip(predicted, kwargs["encoder_hidden_states"], strict=True):
            if torch.equal(context, hidden):
                row.fill_(float("nan"))
        return (predicted,)

    replace_unet(own_loop, poisons_its_rows)
    others = crowd(4, "finite")
    ends = own_loop.run(make_job("nan", prompt="not a number"), *others)
    end = ends["nan"]
    assert isinstance(end, JobFailed)
    assert end.failure.reason is Reason.NON_FINITE
    assert_same_pictures(own_loop, shared_loop, others)


def test_one_failed_image_ends_its_job_once(own_loop: LoopUnderTest) -> None:
    decoder = own_loop.models["tiny"].decoder
    decode = decoder.decode
    calls = []

    def second_fails(latents: torch.Tensor) -> Any:
        calls.append(1)
        return decode(latents * float("nan") if len(calls) == 2 else latents)

    decoder.decode = second_fails  # type: ignore[method-assign]
    ends = own_loop.run(make_job("three", image_count=3), make_job("after", steps=20))
    assert isinstance(ends["three"], JobFailed)
    assert isinstance(ends["after"], JobFinished)


def test_an_image_that_cannot_be_delivered_ends_its_job(
    own_loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ResidentJob._stages

    def raises(self: ResidentJob, now: float) -> StageSeconds:
        if self.job.id == "doomed":
            raise RuntimeError("injected: no such event")
        return stages(self, now)

    monkeypatch.setattr(ResidentJob, "_stages", raises)
    ends = own_loop.run(make_job("doomed"), make_job("other"))
    failed = ends["doomed"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.ENGINE_FAILED
    assert isinstance(ends["other"], JobFinished)


def test_a_lost_device_ends_the_loop(own_loop: LoopUnderTest) -> None:
    def lost(original: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    replace_unet(own_loop, lost)
    own_loop.loop.submit(make_job("any"))
    with pytest.raises(torch.AcceleratorError):
        own_loop.wait_for(lambda: False)


def test_cancelling_one_of_eight(own_loop: LoopUnderTest, shared_loop: LoopUnderTest) -> None:
    jobs = [make_job(f"eight-{i}", seed=i, steps=12) for i in range(8)]

    def cancel_at_the_fourth_step(event: object) -> None:
        if len(own_loop.progress("eight-3")) == 3 and "eight-3" not in own_loop.ends:
            own_loop.loop.cancel("eight-3")

    own_loop.on_event = cancel_at_the_fourth_step
    ends = own_loop.run(*jobs)
    cancelled = ends["eight-3"]
    assert isinstance(cancelled, JobCancelled)
    assert not cancelled.expired
    assert cancelled.wasted_seconds > 0
    assert len(own_loop.progress("eight-3")) <= 4
    own_loop.on_event = lambda _: None
    assert_same_pictures(own_loop, shared_loop, [j for j in jobs if j.id != "eight-3"])


def test_an_expired_job_is_cancelled(own_loop: LoopUnderTest) -> None:
    def expire_at_the_third_step(event: object) -> None:
        if isinstance(event, SampleProgress) and event.step == 3:
            own_loop.loop.extend("late", time.monotonic())

    own_loop.on_event = expire_at_the_third_step
    late = make_job("late", steps=150, deadline=time.monotonic() + 600)
    end = own_loop.run(late)["late"]
    assert isinstance(end, JobCancelled)
    assert end.expired
    assert len(own_loop.progress("late")) == 3


def test_a_truncated_prompt_is_reported(shared_loop: LoopUnderTest) -> None:
    long = make_job("long", prompt="a red star " * 40)
    short = make_job("short")
    negative = make_job("negative", negative_prompt="blue " * 60)
    shared_loop.run(long, short, negative)
    assert shared_loop.image("long").image.prompt_truncated
    assert not shared_loop.image("short").image.prompt_truncated
    assert shared_loop.image("negative").image.prompt_truncated


def test_prompts_are_encoded_once(own_loop: LoopUnderTest) -> None:
    encoder = own_loop.models["tiny"].prompts
    encode, batches = encoder._encode, []

    def spy(texts: list[str]) -> Any:
        batches.append(list(texts))
        return encode(texts)

    encoder._encode = spy  # type: ignore[method-assign]
    own_loop.run(*[make_job(f"same-{i}", seed=i) for i in range(4)])
    own_loop.run(make_job("again"))
    encoded = [text for batch in batches for text in batch]
    assert sorted(encoded) == ["", "a large yellow star on a blue background"]
