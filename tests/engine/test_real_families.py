"""The real architectures of SDXL and FLUX.1: their sizes, and the denoiser calls of batches."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_map_only

from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.families.flux import Flux
from darkroom_server.engine.families.stable_diffusion_xl import StableDiffusionXL
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind
from darkroom_server.engine.pipelines.calls import DenoiserCall, EncodeCall
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample

from . import architectures as real
from .conftest import make_job
from .real import filled

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


def weights(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class Hosted:
    """A family's pipeline whose samples compute on the CPU, and whose denoiser may be elsewhere.

    ``embeddings`` are what its ``encode_prompt`` returns, of the size of the real text encoders.
    """

    family: SuspendedFamily
    scheduler: Any
    embeddings: Callable[[int], tuple[Any, ...]]

    def sample(self, job: Job) -> SuspendedSample:
        """The sample of ``job``, suspended at its first denoiser call."""
        runs = self.runs
        sample = SuspendedSample(
            job,
            0,
            scheduler=hosted_scheduler(self.scheduler()),
            steps=job.steps,
            spec=runs.spec,
            vae_latents=runs.vae_latents,
            prompt_truncated=False,
            device=CPU,
        )
        arguments = {**runs.arguments_of(job), "generator": sample.generator}
        sample.start(runs.host.run(sample.scheduler, arguments, {}))
        while isinstance(sample.pending, EncodeCall):
            sample.resume(self.embeddings(job.seed))
        assert isinstance(sample.pending, DenoiserCall)
        return sample

    @property
    def runs(self) -> Runs:
        return self.family._runs


def host(family: SuspendedFamily) -> None:
    """Prepare ``family`` without its warm-up, which would compute."""
    pipeline = family.pipeline
    family._runs = Runs(
        hosts={
            family.own_task: HostedPipeline(
                pipeline, (family.denoiser_name,), pipeline.vae, CPU, EncodeMemo(0, CPU)
            )
        },
        spec=family.spec,
        arguments_of=family.call_arguments,
        vae_latents=family.vae_latents,
        schedulers={},
        own={},
        precision=nullcontext,
    )


def random(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPE)


def sdxl(unet: Any) -> Hosted:
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=real.on_meta(real.sdxl_vae),
        text_encoder=None,
        # For its projection's width only.
        text_encoder_2=real.on_meta(real.clip_big_g),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=real.sdxl_scheduler(),
        add_watermarker=False,
    )
    family = StableDiffusionXL(pipeline)
    host(family)

    def embeddings(seed: int) -> tuple[Any, ...]:
        hidden = [random(seed + i, 1, 77, 2048) for i in range(2)]
        pooled = [random(seed + i, 1, 1280) for i in range(2)]
        return (*hidden, *pooled)

    return Hosted(family, real.sdxl_scheduler, embeddings)


def flux(transformer: Any) -> Hosted:
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        vae=real.on_meta(real.flux_vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=real.flux_scheduler(),
    )
    family = Flux(pipeline)
    host(family)

    def embeddings(seed: int) -> tuple[Any, ...]:
        return random(seed, 1, 512, 4096), random(seed, 1, 768), torch.zeros(512, 3, dtype=DTYPE)

    return Hosted(family, real.flux_scheduler, embeddings)


@pytest.fixture(scope="module")
def on_meta() -> Mapping[str, Hosted]:
    """Both, with a denoiser that has shapes and no values."""
    return {
        "SDXL": sdxl(real.on_meta(real.sdxl_unet)),
        "FLUX.1 dev": flux(real.on_meta(real.flux_transformer)),
    }


SIZES = {
    "SDXL": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840},
    "FLUX.1 dev": {"transformer": 11_901_408_320, "vae": 83_819_683},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_the_published_ones(on_meta: Mapping[str, Hosted], name: str) -> None:
    pipeline = on_meta[name].family.pipeline
    for part, expected in SIZES[name].items():
        module = getattr(pipeline, part)
        assert weights(module) == expected
        assert sum(w.nbytes for w in module.parameters()) == 2 * expected, "bfloat16"


def test_the_text_encoders_have_the_published_sizes() -> None:
    assert weights(real.on_meta(real.clip_l)) == 123_060_480
    assert weights(real.on_meta(real.t5_xxl)) == 4_762_310_656


def jobs(count: int, size: int) -> list[Job]:
    """Jobs with different prompts, steps, guidance and seeds."""
    return [
        make_job(
            f"job {i}",
            width=size,
            height=size,
            steps=4 + i,
            guidance_scale=3.0 + i,
            seed=10 * i,
            scheduler=SchedulerName.MODEL,
        )
        for i in range(count)
    ]


def arguments_of(samples: Sequence[SuspendedSample]) -> list[Mapping[str, Any]]:
    calls = [sample.pending for sample in samples]
    return [call.arguments for call in calls if isinstance(call, DenoiserCall)]


def walk(hosted: Hosted, spec: ArgumentSpec, samples: Sequence[SuspendedSample]) -> Any:
    """The shapes of what the denoiser returns for the merged calls of ``samples``."""
    merged = spec.collate(arguments_of(samples))
    given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), merged)
    with torch.inference_mode():
        return hosted.runs.call_denoiser(hosted.family.denoiser, given)


OUTPUTS = {"SDXL": (2, (4, 128, 128)), "FLUX.1 dev": (1, (4096, 64))}
"""Rows of an image with guidance, and the shape of a row, at 1024×1024 pixels."""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_batch_fits_the_denoiser(on_meta: Mapping[str, Hosted], name: str, count: int) -> None:
    hosted = on_meta[name]
    rows, shape = OUTPUTS[name]
    samples = [hosted.sample(job) for job in jobs(count, size=1024)]
    try:
        # Different timesteps: the last sample is a step ahead.
        samples[-1].advance((torch.zeros((rows, *shape), dtype=DTYPE),))
        assert len({sample.group for sample in samples}) == 1, "they share a batch"
        output = walk(hosted, hosted.family.spec, samples)
        assert output[0].shape == (count * rows, *shape)
        assert output[0].dtype == DTYPE
        parts = hosted.family.spec.split(output, [sample.rows for sample in samples])
        assert [part[0].shape for part in parts] == [(rows, *shape)] * count
    finally:
        for sample in samples:
            sample.close()


WRONG_KINDS = {
    "SDXL": {"added_cond_kwargs.time_ids": Kind.SAME},
    "FLUX.1 dev": {"img_ids": Kind.ROWS},
}
"""An argument that has a row for each image, and one that has none."""


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_the_walk_notices_a_wrong_kind(on_meta: Mapping[str, Hosted], name: str) -> None:
    """The control: the same batch with one argument merged in another way."""
    hosted = on_meta[name]
    spec = hosted.family.spec
    samples = [hosted.sample(job) for job in jobs(2, size=1024)]
    try:
        assert walk(hosted, spec, samples)[0].shape[0] > 1
        with pytest.raises(RuntimeError):
            walk(hosted, replace(spec, kinds={**spec.kinds, **WRONG_KINDS[name]}), samples)
    finally:
        for sample in samples:
            sample.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sdxls_unet_takes_a_step_at_512(capsys: pytest.CaptureFixture[str]) -> None:
    """Real weights in number, random in value: 5 GB. Two images in one batch, and one alone."""
    hosted = sdxl(filled(real.sdxl_unet))
    spec, unet = hosted.family.spec, hosted.family.denoiser
    samples = [
        hosted.sample(replace(job, guidance_scale=1.0, steps=20 * i + 4))
        for i, job in enumerate(jobs(2, size=512))
    ]
    calls = arguments_of(samples)
    assert calls[0]["sample"].shape == (1, 4, 64, 64)
    began = time.monotonic()
    with torch.inference_mode():
        both = spec.split(hosted.runs.call_denoiser(unet, spec.collate(calls)), [1, 1])
        batch_seconds = time.monotonic() - began
        alone = hosted.runs.call_denoiser(unet, spec.alone(calls[1]))
    with capsys.disabled():
        print(f"a batch of two rows took {batch_seconds:.1f} s")
    before = arguments_of(samples)[1]["sample"]
    off = [(part[0] - alone[0]).abs().max() / alone[0].abs().max() for part in both]
    assert off[1] < 0.05, "as alone, in bfloat16"
    assert off[0] > 0.2, "the control: the other image's prediction differs"
    samples[1].advance(both[1])
    after = arguments_of(samples)[1]["sample"]
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    for sample in samples:
        sample.close()
