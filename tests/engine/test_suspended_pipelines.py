"""Suspended pipelines in the loop: failures, cancels, memory, and what they share."""

import gc
import hashlib
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import (
    Counted,
    JobCancelled,
    JobFailed,
    JobFinished,
    PreviewReady,
    SampleProgress,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.batching import runner
from darkroom_server.engine.pipelines import coroutine as coroutines
from darkroom_server.engine.pipelines.model import SuspendedModel
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample

from .conftest import LoopUnderTest, config_for, make_job

names = itertools.count()

QUIET = structlog.wrap_logger(
    structlog.PrintLogger(),
    wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LoopUnderTest]:
    """A loop for tests that leave it as they found it."""
    loop = LoopUnderTest(config_for(folder))
    yield loop
    loop.close()


@pytest.fixture
def own(folder: Path) -> Iterator[LoopUnderTest]:
    """A loop of the test's own, to break."""
    loop = LoopUnderTest(config_for(folder))
    yield loop
    loop.close()


def model_of(loop: LoopUnderTest) -> SuspendedModel:
    model: Any = loop.models["tiny"]
    assert isinstance(model, SuspendedModel)
    return model


def job(name: str, **fields: Any) -> Job:
    return make_job(f"{name}-{next(names)}", **{"scheduler": SchedulerName.MODEL, **fields})


def pixels(loop: LoopUnderTest, job: Job, index: int = 0) -> Any:
    return np.frombuffer(loop.image(job.id, index).image.data, np.uint8).astype(int)


def assert_as_alone(loop: LoopUnderTest, other: LoopUnderTest, jobs: list[Job]) -> None:
    """The images of ``jobs`` equal those of the same jobs alone in ``other``, to the last bits."""
    for each in jobs:
        alone = replace(each, id=f"alone-{next(names)}")
        other.run(alone)
        assert np.abs(pixels(loop, each) - pixels(other, alone)).max() <= 1


def replace_denoiser(
    monkeypatch: pytest.MonkeyPatch, loop: LoopUnderTest, run: Callable[..., Any]
) -> None:
    """Let ``run(original, arguments)`` compute what the denoiser of ``loop`` does."""
    runs = model_of(loop).runs
    original = Runs.call_denoiser

    def call(self: Runs, module: Any, arguments: Any, samples: Any) -> Any:
        if self is not runs:
            return original(self, module, arguments, samples)
        return run(lambda **given: original(self, module, given, samples), dict(arguments))

    monkeypatch.setattr(Runs, "call_denoiser", call)


def mark(loop: LoopUnderTest, marked: Job) -> None:
    """Give ``marked`` an input that marks its rows; it still shares their batches."""
    runs = model_of(loop).runs
    arguments_of = runs.arguments_of

    def with_mark(job: Job) -> Any:
        extra = {"original_size": (72, 72)} if job.id == marked.id else {}
        return {**arguments_of(job), **extra}

    object.__setattr__(runs, "arguments_of", with_mark)


def marked_rows(arguments: dict[str, Any]) -> torch.Tensor:
    """Which rows are those of the marked job, [rows]."""
    marked: torch.Tensor = arguments["added_cond_kwargs"]["time_ids"][:, 0] == 72
    return marked


def test_a_failed_batch_is_split_and_only_the_poison_job_fails(
    own: LoopUnderTest, shared: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def breaks(original: Any, arguments: dict[str, Any]) -> Any:
        if bool(marked_rows(arguments).any()):
            sizes.append(len(arguments["sample"]))
            raise ValueError("injected: secret")
        return original(**arguments)

    replace_denoiser(monkeypatch, own, breaks)
    poison = job("poison", steps=4)
    mark(own, poison)
    others = [job("other", seed=i, steps=5 + i) for i in range(3)]
    starter = job("starter", steps=30)
    own.loop.submit(starter)
    own.wait_for(lambda: bool(own.progress(starter.id)))
    ends = own.run(*others, poison)
    failed = ends[poison.id]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.ENGINE_FAILED
    assert "secret" not in failed.failure.message
    assert max(sizes) > 2, "the poison job shared a batch"
    assert_as_alone(own, shared, others)


def test_an_error_of_the_pipeline_fails_its_own_job(
    own: LoopUnderTest, shared: LoopUnderTest
) -> None:
    # The scheduler of an exact job takes its own steps.
    doomed = job("doomed", steps=6, scheduler=SchedulerName.DDIM, exact=True)
    template = model_of(own).runs.schedulers[SchedulerName.DDIM]
    step = type(template).step
    calls: list[int] = []

    class Failing(type(template)):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise IndexError("injected")
            return step(self, *args, **kwargs)

    template.__class__ = Failing
    others = [job("other", seed=i, steps=5 + i) for i in range(3)]
    ends = own.run(doomed, *others)
    failed = ends[doomed.id]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.SCHEDULER_FAILED
    assert len(own.progress(doomed.id)) == 2
    assert_as_alone(own, shared, others)


def test_a_prompt_that_cannot_be_encoded_fails_its_own_job(
    own: LoopUnderTest, shared: LoopUnderTest
) -> None:
    pipeline = model_of(own).runs.host._template
    forward = pipeline.text_encoder_2.forward
    pipeline.text_encoder_2.forward = lambda *a, **k: (_ for _ in ()).throw(ValueError("injected"))
    failed = own.run(job("doomed", image_count=3))
    (end,) = failed.values()
    assert isinstance(end, JobFailed)
    assert end.failure.message == "the prompt could not be encoded"
    pipeline.text_encoder_2.forward = forward
    fine = job("fine")
    own.run(fine)
    assert_as_alone(own, shared, [fine])


def test_non_finite_values_fail_and_give_no_black_image(
    own: LoopUnderTest, shared: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = job("poison", steps=9)
    mark(own, poison)

    def poisons(original: Any, arguments: dict[str, Any]) -> Any:
        predicted = original(**arguments)[0].clone()
        predicted[marked_rows(arguments)] = float("nan")
        return (predicted,)

    replace_denoiser(monkeypatch, own, poisons)
    others = [job("other", seed=i, steps=5 + i) for i in range(2)]
    ends = own.run(poison, *others)
    failed = ends[poison.id]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.NON_FINITE
    assert_as_alone(own, shared, others)


def test_the_vae_decodes_in_float32_without_autocast_in_half_precision(folder: Path) -> None:
    loop = LoopUnderTest(config_for(folder, dtype=Dtype.BFLOAT16, autocast=True))
    try:
        seen: list[tuple[torch.dtype, bool]] = []
        pipeline = model_of(loop).runs.host._template
        pipeline.vae.decoder.register_forward_pre_hook(
            lambda _, inputs: seen.append((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
        )
        unet: list[tuple[torch.dtype, bool]] = []
        pipeline.unet.conv_in.register_forward_pre_hook(
            lambda _, inputs: unet.append((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
        )
        one = job("half")
        assert isinstance(loop.run(one)[one.id], JobFinished)
        assert seen == [(torch.float32, False)]
        assert set(unet) == {(torch.bfloat16, True)}
        assert {weight.dtype for weight in pipeline.vae.parameters()} == {torch.float32}
        assert pixels(loop, one).std() > 1, "the image is not of one colour"
    finally:
        loop.close()


def test_cached_embeddings_are_used_and_never_written_into(shared: LoopUnderTest) -> None:
    model = model_of(shared)
    memo = model.runs.host.memo

    def digests() -> dict[Any, str]:
        found = {}
        for key, (encoded, _) in memo._found.items():
            data = b"".join(t.numpy().tobytes() for t in encoded if isinstance(t, torch.Tensor))
            found[key] = hashlib.sha256(data).hexdigest()
        return found

    first = job("first", prompt="a purple star", negative_prompt="red", image_count=3)
    shared.run(first)
    before = digests()
    encoded = sum(e.counts.get(Counted.PROMPTS_ENCODED, 0) for e in counts(shared))
    again = job("again", prompt="a purple star", negative_prompt="red")
    shared.run(again, job("other", prompt="a purple star", guidance_scale=2.0))
    after = digests()
    assert {key: after[key] for key in before} == before
    now = sum(e.counts.get(Counted.PROMPTS_ENCODED, 0) for e in counts(shared))
    assert now == encoded + 1, "only the prompt without a negative one was encoded"
    assert np.array_equal(pixels(shared, first), pixels(shared, again))


def counts(loop: LoopUnderTest) -> list[Any]:
    return [event for event in loop.events if type(event).__name__ == "EngineCounts"]


def test_the_memo_keeps_the_last_used_within_its_bytes() -> None:
    memo = model_memo(max_bytes=100)
    tensor = torch.zeros(10)  # 40 bytes.
    memo.keep("a", (tensor, None))
    memo.keep("b", [tensor])
    assert memo.find("a")[1] is None
    memo.keep("c", tensor)
    assert ("a" in memo, "b" in memo, "c" in memo, memo.bytes) == (True, False, True, 80)
    memo.keep("huge", torch.zeros(26))
    assert "huge" not in memo


def model_memo(max_bytes: int) -> Any:
    from darkroom_server.engine.pipelines.encode_memo import EncodeMemo

    return EncodeMemo(max_bytes, torch.device("cpu"))


def cancel_at_first_step(loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch) -> type:
    loop.on_event = lambda event: (
        loop.loop.cancel(event.job_id) if isinstance(event, SampleProgress) else None
    )
    return JobCancelled


def fail_in_the_pipeline(loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The last sample of a batch fails in its scheduler, and with it its job."""
    template = model_of(loop).runs.schedulers[SchedulerName.MODEL]
    step = type(template).step

    class Failing(type(template)):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            if self.num_inference_steps == 50:
                raise IndexError("injected")
            return step(self, *args, **kwargs)

    monkeypatch.setattr(template, "__class__", Failing)
    return JobFailed


def fail_in_the_denoiser(loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Each merged call fails, and so do its halves, down to single samples."""

    def breaks(original: Any, arguments: dict[str, Any]) -> Any:
        raise ValueError("injected", arguments)

    replace_denoiser(monkeypatch, loop, breaks)
    return JobFailed


@pytest.mark.parametrize("end", [cancel_at_first_step, fail_in_the_pipeline, fail_in_the_denoiser])
def test_samples_that_end_early_leave_no_tensor(
    own: LoopUnderTest,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[LoopUnderTest, pytest.MonkeyPatch], type],
) -> None:
    """Hundreds of samples, each cancelled or failed in its first or second step."""
    alive: list[weakref.ref[Any]] = []
    receive = SuspendedSample._receive

    def remember(self: SuspendedSample, found: Any) -> None:
        arguments = getattr(found, "arguments", {})
        # Not the embeddings: the memo keeps them.
        alive.extend(weakref.ref(arguments[n]) for n in ("sample", "timestep") if n in arguments)
        receive(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(SuspendedSample, "_receive", remember)
        # Thousands of tracebacks take longer than the steps.
        patch.setattr(runner, "log", QUIET)
        expected = end(own, patch)
        for _ in range(40):
            ends = own.run(job("ended", image_count=16, guidance_scale=1.0, steps=50))
            assert {type(event) for event in ends.values()} == {expected}
        assert len(alive) > 640
    own.on_event = lambda _: None
    last = job("last")
    assert isinstance(own.run(last)[last.id], JobFinished)
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 2, "only the last batch's may be there"


def test_a_pipeline_that_swallows_its_end_costs_nobody_else_anything(
    own: LoopUnderTest, shared: LoopUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    template = model_of(own).runs.host._template
    call = type(template).__call__

    def swallows(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            return call(self, *args, **kwargs)

    type(template).__call__ = swallows
    stubborn, other = job("stubborn", steps=50), job("other", steps=9)
    own.on_event = lambda event: (
        own.loop.cancel(stubborn.id)
        if isinstance(event, SampleProgress) and event.job_id == stubborn.id
        else None
    )
    ends = own.run(stubborn, other)
    own.on_event = lambda _: None
    assert isinstance(ends[stubborn.id], JobCancelled)
    assert "swallowed its end" in capsys.readouterr().out
    assert_as_alone(own, shared, [other])


def test_between_a_pipeline_and_its_denoiser_are_only_known_frames(
    own: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: set[str] = set()
    resume = coroutines.Coroutine.resume

    def look(self: Any, value: Any) -> Any:
        frame = self._greenlet.gr_frame
        while frame is not None:
            files.add(frame.f_code.co_filename)
            frame = frame.f_back
        return resume(self, value)

    monkeypatch.setattr(coroutines.Coroutine, "resume", look)
    own.run(job("framed"))
    known = (
        "engine/pipelines/coroutine.py",
        "engine/pipelines/hosted_pipeline.py",
        "engine/pipelines/hosted_scheduler.py",
        "diffusers/pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py",
        "torch/nn/modules/module.py",
        "torch/utils/_contextlib.py",
    )
    assert files
    assert [file for file in files if not file.endswith(known)] == []


def test_previews_come_without_changing_the_image(shared: LoopUnderTest) -> None:
    plain, watched = job("plain", steps=8), job("watched", steps=8, preview_every=3)
    shared.run(plain, watched)
    previews = [e for e in shared.events if isinstance(e, PreviewReady) and e.job_id == watched.id]
    assert [preview.step for preview in previews] == [3, 6]
    assert np.array_equal(pixels(shared, plain), pixels(shared, watched))


def test_a_job_runs_again_with_the_same_bytes_after_a_new_start(
    shared: LoopUnderTest, own: LoopUnderTest
) -> None:
    first = job("first", exact=True, scheduler=SchedulerName.EULER_ANCESTRAL, image_count=2)
    shared.run(first)
    again = replace(first, id="again", skip=frozenset({0}))
    own.run(again, job("crowd"))
    assert np.array_equal(pixels(shared, first, 1), pixels(own, again, 1))


plans = st.lists(
    st.fixed_dictionaries(
        {
            "scheduler": st.sampled_from([SchedulerName.MODEL, SchedulerName.DDIM]),
            "steps": st.integers(2, 12),
            "guidance_scale": st.sampled_from([0.0, 1.0, 1.5, 7.5]),
            "width": st.sampled_from([64, 64, 72]),
            "seed": st.integers(0, 2**63 - 1),
            "image_count": st.integers(1, 2),
            "prompt": st.sampled_from(["a red ring", "a small heart 😀", "blue " * 50]),
            "exact": st.booleans(),
        }
    ),
    min_size=2,
    max_size=5,
)
moments = st.lists(
    st.tuples(st.integers(0, 15), st.none() | st.integers(0, 20)), min_size=5, max_size=5
)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=plans, moments=moments)
def test_any_schedule_of_joins_and_cancels(
    shared: LoopUnderTest, plans: list[dict[str, Any]], moments: list[tuple[int, int | None]]
) -> None:
    """Each job joins after some steps of any job, and may be cancelled after some more."""
    jobs = [job("random", **plan) for plan in plans]
    timeline: list[tuple[int, str, Job]] = []
    for each, (joins, leaves) in zip(jobs, moments, strict=False):
        timeline.append((joins, "submit", each))
        if leaves is not None:
            timeline.append((joins + leaves, "then cancel", each))
    timeline.sort(key=lambda entry: entry[:2])
    steps = 0

    def act(event: object) -> None:
        nonlocal steps
        if not isinstance(event, SampleProgress):
            return
        steps += 1
        while timeline and timeline[0][0] <= steps:
            _, what, each = timeline.pop(0)
            if what == "submit":
                shared.loop.submit(each)
            else:
                shared.loop.cancel(each.id)

    shared.on_event = act
    try:
        shared.run(job("starter", steps=40))
    finally:
        shared.on_event = lambda _: None
    shared.wait_for(lambda: all(each.id in shared.ends for each in jobs))
    for each, (_, leaves) in zip(jobs, moments, strict=False):
        end = shared.ends[each.id]
        if isinstance(end, JobCancelled):
            assert leaves is not None
            continue
        assert isinstance(end, JobFinished)
        alone = replace(each, id=f"alone-{next(names)}")
        shared.run(alone)
        for index in range(each.image_count):
            off = np.abs(pixels(shared, each, index) - pixels(shared, alone, index)).max()
            assert off <= (0 if each.exact else 1), each
