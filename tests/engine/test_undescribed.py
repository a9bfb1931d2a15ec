"""Pipelines that nobody has described: served one call at a time, or rejected with one line."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import structlog
import torch
from numpy.typing import NDArray

from bench.tiny_families.case import PROMPTS
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import (
    BatchDone,
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.loading.folder import read_index
from darkroom_server.engine.pipelines import hosted_pipeline
from darkroom_server.engine.pipelines.hosted_pipeline import sharing_copy

from .conftest import LoopUnderTest, config_for, make_job
from .families.undescribed import WRITERS
from .folders import edit_index, edited

STEPS = (5, 3, 4)


class Served:
    """A model that nobody has described in a loop, and the same pipeline by itself."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        with structlog.testing.capture_logs() as self.logs:
            self.loop = LoopUnderTest(config_for(folder))
        self.info = self.loop.models["tiny"].info
        self._alone = diffusers.DiffusionPipeline.from_pretrained(folder)
        self._alone.set_progress_bar_config(disable=True)

    def jobs(self, name: str, **fields: Any) -> list[Job]:
        """Jobs that differ in prompt, steps, guidance and seed."""
        usual = {"scheduler": SchedulerName.MODEL, **fields}
        return [
            make_job(
                f"{name}-{i}",
                prompt=PROMPTS[i],
                negative_prompt="blue" if i == 1 else "",
                steps=steps,
                guidance_scale=3.0 + i,
                seed=i,
                **usual,
            )
            for i, steps in enumerate(STEPS)
        ]

    def alone(self, job: Job) -> NDArray[np.uint8]:
        """The pixels that the pipeline generates by itself for ``job``."""
        result = self._alone(
            job.prompt,
            negative_prompt=job.negative_prompt or None,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            width=job.width,
            height=job.height,
            generator=torch.Generator("cpu").manual_seed(job.seed),
        )
        return np.asarray(result.images[0])

    def pixels(self, job: Job) -> NDArray[np.uint8]:
        """The pixels that were served for ``job``."""
        data = self.loop.image(job.id).image.data
        return np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)


@pytest.fixture(scope="module", params=WRITERS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    torch.set_num_threads(1)
    folder = WRITERS[request.param](tmp_path_factory.mktemp("undescribed"))
    made = Served(request.param, folder)
    yield made
    made.loop.close()


@pytest.fixture
def sag(tmp_path: Path) -> Iterator[Served]:
    """One that writes to its denoiser, for a test of its own."""
    torch.set_num_threads(1)
    kind = "StableDiffusionSAGPipeline"
    made = Served(kind, WRITERS[kind](tmp_path))
    yield made
    made.loop.close()


def test_jobs_take_turns_and_have_the_pipelines_bytes(served: Served) -> None:
    jobs = served.jobs("turns")
    served.loop.run(*jobs)
    for job in jobs:
        assert isinstance(served.loop.ends[job.id], JobFinished), served.loop.ends[job.id]
        assert np.array_equal(served.pixels(job), served.alone(job))
    different = {served.pixels(job).tobytes() for job in jobs}
    assert len(different) == len(jobs)
    ids = [e.job_id for e in served.loop.events if isinstance(e, SampleProgress)]
    assert sum(a != b for a, b in pairwise(ids)) > len(jobs), "no turns"
    batches = [e for e in served.loop.events if isinstance(e, BatchDone)]
    assert {batch.samples for batch in batches} == {1}
    assert {batch.max_rows for batch in batches} == {1}


def test_another_size(served: Served) -> None:
    job = served.jobs("wide", width=128, height=64)[0]
    served.loop.run(job)
    assert np.array_equal(served.pixels(job), served.alone(job))


def test_what_the_model_says_of_itself(served: Served) -> None:
    info = served.info
    assert info.kind == served.kind
    assert served.kind in info.unbatched_reason
    assert {"event": "denoiser calls are not batched", "why": info.unbatched_reason} in [
        {name: line[name] for name in ("event", "why") if name in line} for line in served.logs
    ]
    assert (info.defaults.width, info.defaults.height) == (64, 64)
    assert info.limits.max_rows == info.rows_of_a_pass(64, 64) == 1
    assert info.speed.passes[0][0] == 1
    assert info.memory.bytes_per_sample > 0
    assert {"negative_prompt", "guidance_scale"} <= info.optional_fields
    assert "preview" not in info.optional_fields


def test_the_calls_of_an_image_are_counted_before(served: Served) -> None:
    per_step = {"StableDiffusionSAGPipeline": 2, "AmusedPipeline": 1}[served.kind]
    jobs = served.jobs("calls")
    served.loop.run(*jobs)
    for job in jobs:
        assert served.info.denoiser_calls(job) == per_step * job.steps
        steps = served.loop.progress(job.id)
        assert len(steps) == per_step * job.steps
        assert {step.steps for step in steps} == {per_step * job.steps}


def test_cancel_between_calls(served: Served) -> None:
    victim, other, _ = served.jobs("cancel")

    def cancel_after_a_step(event: Event) -> None:
        if isinstance(event, SampleProgress) and event.job_id == victim.id:
            served.loop.loop.cancel(victim.id)

    served.loop.on_event = cancel_after_a_step
    try:
        served.loop.run(victim, other)
    finally:
        served.loop.on_event = lambda _: None
    assert isinstance(served.loop.ends[victim.id], JobCancelled)
    assert len(served.loop.progress(victim.id)) < victim.steps
    assert np.array_equal(served.pixels(other), served.alone(other))


def test_runs_share_the_weights_and_nothing_else(tmp_path: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(WRITERS["AmusedPipeline"](tmp_path))
    original = pipeline.transformer
    copied = sharing_copy(original)
    for one, other in zip(original.parameters(), copied.parameters(), strict=True):
        assert one is other
    modules = set(original.modules())
    assert not any(module in modules for module in copied.modules())


def test_a_pipeline_that_writes_to_a_shared_denoiser_is_noticed(
    sag: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(module: torch.nn.Module) -> torch.nn.Module:
        module.__dict__.pop("forward", None)
        return module

    monkeypatch.setattr(hosted_pipeline, "sharing_copy", shared)
    jobs = sag.jobs("shared")
    sag.loop.run(*jobs)
    assert any(
        isinstance(sag.loop.ends[job.id], JobFailed)
        or not np.array_equal(sag.pixels(job), sag.alone(job))
        for job in jobs
    )


def index_only(folder: Path, kind: str, **parts: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("WanPipeline", "returns frames; Darkroom generates images from text"),
        ("AudioLDM2Pipeline", "returns audios;"),
        ("KandinskyPriorPipeline", "returns image_embeds, negative_image_embeds;"),
        ("DDPMPipeline", "takes no prompt;"),
        ("WuerstchenCombinedPipeline", "does not say what it returns;"),
        ("NoSuchPipeline", "which diffusers .* does not know"),
        ("FluxTransformer2DModel", "which diffusers .* does not know"),
        ("logging", "which diffusers .* does not know"),
        ("CogView4Pipeline", "without a denoiser"),
    ],
)
def test_a_class_that_cannot_be_served(kind: str, words: str, tmp_path: Path) -> None:
    folder = index_only(tmp_path, kind, scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(StartupError, match=words) as caught:
        read_index(folder, "model")
    assert "\n" not in str(caught.value)


def test_a_component_of_another_library(tmp_path: Path) -> None:
    """diffusers would import it."""
    folder = index_only(tmp_path, "CogView4Pipeline", tokenizer=["my_tokenizer", "Own"])
    with pytest.raises(StartupError, match=r"its tokenizer is a my_tokenizer\.Own, which is not"):
        read_index(folder, "model")


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "needs an image": (
        lambda f: edit_index(f, _class_name="StableDiffusionImg2ImgPipeline"),
        "cannot generate an image from a prompt alone",
    ),
    "no text encoder": (
        lambda f: edit_index(f, text_encoder=[None, None]),
        "has no text_encoder; copy or download it again",
    ),
    "no weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "no weights of its unet",
    ),
    "pickle": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/weights.bin"),
        "are not read; convert them to safetensors",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_folder_that_cannot_be_served(name: str, tmp_path: Path) -> None:
    edit, words = UNFIT[name]
    written = WRITERS["StableDiffusionSAGPipeline"](tmp_path / "sag")
    folder = edited(written, tmp_path / "edited", edit)
    with pytest.raises(StartupError, match=words) as caught:
        LoopUnderTest(config_for(folder))
    assert "\n" not in str(caught.value)


def test_noise_that_no_seed_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = diffusers.StableDiffusionSAGPipeline.prepare_latents

    def unseeded(self: Any, *args: Any) -> torch.Tensor:
        latents: torch.Tensor = prepare(self, *args)
        return latents + torch.randn(latents.shape)

    monkeypatch.setattr(diffusers.StableDiffusionSAGPipeline, "prepare_latents", unseeded)
    folder = WRITERS["StableDiffusionSAGPipeline"](tmp_path)
    with pytest.raises(StartupError, match="noise that no seed repeats"):
        LoopUnderTest(config_for(folder))


def test_a_pipeline_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = diffusers.StableDiffusionSAGPipeline.check_inputs

    def one_size(self: Any, prompt: str, height: int, width: int, *args: Any) -> None:
        if (width, height) != (64, 64):
            raise ValueError("`height` and `width` must be 64")
        check(self, prompt, height, width, *args)

    monkeypatch.setattr(diffusers.StableDiffusionSAGPipeline, "check_inputs", one_size)
    folder = WRITERS["StableDiffusionSAGPipeline"](tmp_path)
    loop = LoopUnderTest(config_for(folder))
    try:
        limits = loop.models["tiny"].info.limits
        assert (limits.min_size, limits.max_size, limits.size_multiple) == (64, 64, 64)
        assert isinstance(
            loop.run(make_job("fixed", scheduler=SchedulerName.MODEL))["fixed"], JobFinished
        )
    finally:
        loop.close()
