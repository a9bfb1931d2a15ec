"""The cost of a step besides the denoiser, in each of four forms, for Stable Diffusion.

The loop is written by hand or a suspended run of diffusers' pipeline; each sample's scheduler takes
its own steps, or they are merged. The denoiser is replaced by one that returns random numbers made
before, so that only the rest of a step is measured.
"""

import argparse
import copy
import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.inprocess.suspended_sd import SuspendedStableDiffusion
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source
from bench.report.markdown import table
from bench.report.results import Results
from bench.report.statistics import bootstrap_median, quantile
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.job import ImageFormat, Job, SchedulerName
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.schedulers import config_of, make_scheduler
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.families.stable_diffusion import StableDiffusionModel
from darkroom_server.engine.latent_sample import new_sample
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline
from darkroom_server.engine.pipelines import coroutine
from darkroom_server.engine.pipelines.calls import EncodeCall
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.pipelines.model import SuspendedModel
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.stepping.merged_step import take_steps
from darkroom_server.engine.stepping.schedules import Schedules
from darkroom_server.engine.warmup.formats import MemoryFormat

SAMPLES = (1, 8, 16)
COUNTED_SAMPLES = (1, 8)
SCHEDULERS = (
    SchedulerName.DDIM,
    SchedulerName.EULER,
    SchedulerName.DPMPP_2M_SDE_KARRAS,
    SchedulerName.UNIPC,
)
META = torch.device("meta")
BY_HAND, SUSPENDED, MERGED = "by hand", "suspended", ", merged"
FORMS = tuple(loop + how for how in ("", MERGED) for loop in (BY_HAND, SUSPENDED))


class Kernels(TorchDispatchMode):
    """Counts what a GPU would do, on the meta device, which has shapes and no values.

    Reading a value from it raises, as it would make a GPU's caller wait. ``counts`` has kernels
    (calls that write new values on the device), copies to the device, and host calls (those of
    torch that compute on the CPU only).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        if not any(tensor.is_meta for tensor in (*given, *made)):
            self.counts["host calls"] += 1
        elif made and not self._is_view(func, given, made):
            from_host = bool(given) and not any(tensor.is_meta for tensor in given)
            self.counts["copies to the device" if from_host else "kernels"] += 1
        return found

    @staticmethod
    def _is_view(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
        if func._schema.is_mutable:
            return False
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        return all(tensor.untyped_storage()._cdata in storages for tensor in made)


class Forms:
    """One pipeline whose UNet returns random numbers, and the samples of all forms for it."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        unet = pipeline.unet
        compute = unet.forward

        family = SuspendedStableDiffusion(pipeline)
        self.size = family.size
        side = self.size // family.latent_factor
        self.shape = (int(unet.config.in_channels), side, side)
        rows = 2 * max(SAMPLES)
        noise = torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(0))
        predictions = noise.to(device=device, dtype=unet.dtype)

        @functools.wraps(compute)
        def predict(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (predictions[: len(sample)],)

        unet.forward = predict
        self.device = device
        self.unet = unet
        self.runs = Runs(
            hosts={
                family.own_task: HostedPipeline(
                    pipeline, ("unet",), pipeline.vae, device, EncodeMemo(0, device)
                )
            },
            spec=family.spec,
            arguments_of=family.call_arguments,
            vae_latents=family.vae_latents,
            schedulers={},
            own={},
            precision=nullcontext,
        )
        self.schedules = Schedules(config_of(pipeline.scheduler))
        self.templates = {
            name: hosted_scheduler(make_scheduler(name, config_of(pipeline.scheduler)))
            for name in SCHEDULERS
        }
        # Neither a denoiser call nor a step needs the rest of a model.
        unused: Any = None
        self.models: dict[str, Model] = {
            BY_HAND: StableDiffusionModel(
                info=unused,
                prompts=unused,
                unet=unet,
                decoder=unused,
                previewer=None,
                safety=None,
                precision=nullcontext,
                schedules=self.schedules,
                latent_channels=self.shape[0],
                latent_factor=family.latent_factor,
                device=device,
                memory_format=MemoryFormat(unet.dtype, channels_last=False),
            ),
            SUSPENDED: SuspendedModel(
                info=unused,
                runs=self.runs,
                is_truncated=lambda _: False,
                decoder=unused,
                previewer=None,
                safety=None,
                encodes_slowly=False,
            ),
        }
        hidden = (1, family.prompt_tokens, int(unet.config.cross_attention_dim))
        generator = torch.Generator().manual_seed(1)
        self.embeddings = tuple(
            torch.randn(hidden, generator=generator).to(device=device, dtype=unet.dtype)
            for _ in range(2)
        )

    def new(self, form: str, job: Job) -> Sample:
        """A sample of ``form``, one of ``FORMS``, before its first step."""
        merges = form.endswith(MERGED)
        if form.startswith(BY_HAND):
            negative, positive = (Embedding(each, False) for each in self.embeddings)
            fields: dict[str, Any] = {
                "embeddings": (negative, positive),
                "latent_shape": self.shape,
                "device": self.device,
                "dtype": self.unet.dtype,
            }
            return new_sample(replace(job, exact=not merges), 0, self.schedules, **fields)
        scheduler = copy.deepcopy(self.templates[job.scheduler])
        scheduler.merges = merges
        sample = SuspendedSample(
            job,
            0,
            scheduler=scheduler,
            steps=job.steps,
            spec=self.runs.spec,
            vae_latents=self.runs.vae_latents,
            prompt_truncated=False,
            device=self.device,
        )
        arguments = {**self.runs.arguments_of(job), "generator": sample.generator}
        sample.start(self.runs.host.run(sample.scheduler, arguments, {}))
        while isinstance(sample.pending, EncodeCall):
            sample.resume(self.embeddings[::-1])
        return sample

    def step(self, form: str, samples: Sequence[Sample]) -> None:
        """One denoiser call, and the step of each of ``samples``."""
        outputs = self.models[form.partition(",")[0]].denoise(samples)
        begun = [(s, s.begin_step(output)) for s, output in zip(samples, outputs, strict=True)]
        waiting = [(sample, step) for sample, step in begun if step is not None]
        assert bool(waiting) == form.endswith(MERGED)
        results = take_steps([step for _, step in waiting]) if waiting else []
        for (sample, _), result in zip(waiting, results, strict=True):
            sample.finish_step(result)

    def job(self, seed: int, steps: int, scheduler: SchedulerName) -> Job:
        """A guided image of the default size."""
        return Job(
            id=str(seed),
            model="",
            prompt="a red star",
            negative_prompt="",
            width=self.size,
            height=self.size,
            steps=steps,
            guidance_scale=7.5,
            seed=seed,
            image_count=1,
            scheduler=scheduler,
            format=ImageFormat.PNG,
            quality=90,
            exact=False,
            submitted_at=0.0,
        )


def step_seconds(
    forms: Forms, form: str, scheduler: SchedulerName, images: int, steps: int
) -> float:
    """CPU seconds of one step of one of ``images`` that share each batch, without the denoiser.

    It is one thread's time, which others on the machine hardly change.
    """
    jobs = [forms.job(seed, steps, scheduler) for seed in range(images)]
    samples = [forms.new(form, job) for job in jobs]
    began = time.thread_time()
    for _ in range(steps):
        forms.step(form, samples)
    seconds = time.thread_time() - began
    for sample in samples:
        sample.close()
    return seconds / steps / images


def count_step(forms: Forms, form: str, scheduler: SchedulerName, images: int) -> dict[str, int]:
    """What one batch of ``images`` does, from its second step to its third."""
    samples = [forms.new(form, forms.job(seed, 4, scheduler)) for seed in range(images)]
    forms.step(form, samples)
    with Kernels() as seen:
        forms.step(form, samples)
    for sample in samples:
        sample.close()
    return dict(seen.counts)


def count_steps(source: ModelSource) -> list[dict[str, Any]]:
    """The counts of all forms of the model of ``source``, with each scheduler."""
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.bfloat16).to("meta")
    # Autocast, which all forms leave off, has no meta device.
    state = coroutine.thread_state("cpu")
    with mock.patch.object(coroutine, "thread_state", lambda _: state), torch.inference_mode():
        forms = Forms(pipeline, META)
        return [
            {
                "scheduler": scheduler.value,
                "form": form,
                "images": images,
                **count_step(forms, form, scheduler, images),
            }
            for scheduler in SCHEDULERS
            for images in COUNTED_SAMPLES
            for form in FORMS
        ]


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Measurement:
    """All forms in turns on the CPU, then the counts on the meta device."""
    source = model_source(options.model)
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.bfloat16)
    torch.set_num_threads(1)
    forms = Forms(pipeline, torch.device("cpu"))
    times = []
    for scheduler in SCHEDULERS:
        for images in SAMPLES:
            rounds: list[dict[str, float]] = []
            for round in range(options.rounds + 1):
                names = FORMS if round % 2 else FORMS[::-1]
                rounds.append(
                    {n: step_seconds(forms, n, scheduler, images, options.steps) for n in names}
                )
            # The first round warms up.
            times.append({"scheduler": scheduler.value, "images": images, "rounds": rounds[1:]})
    figures = {"times": times, "counts": count_steps(source)}
    return Measurement(figures=figures, model={"id": source.id})


COUNTED = ("kernels", "copies to the device", "host calls")


RATIOS = ((SUSPENDED, BY_HAND), (BY_HAND + MERGED, BY_HAND), (SUSPENDED + MERGED, BY_HAND))
"""The forms that are compared, each with the second."""


def describe(results: Results) -> list[str]:
    """A text, the times and the counts."""
    times = [
        [
            f"{each['scheduler']}, {each['images']} in a batch",
            *(f"{quantile([r[n] for r in each['rounds']], 0.5) * 1e6:.0f}" for n in FORMS),
            *(_ratio(each["rounds"], form, other) for form, other in RATIOS),
        ]
        for each in results.figures["times"]
    ]
    counts = [
        [
            f"{each['scheduler']}, {each['images']} in a batch, {each['form']}",
            *(str(each.get(c, 0)) for c in COUNTED),
        ]
        for each in results.figures["counts"]
    ]
    return [
        "Stable Diffusion has a loop written by hand; other families are suspended runs of "
        "diffusers' own pipeline. Merged: the steps of a batch are one product; else each sample's "
        "scheduler takes its own, as for `exact` jobs. Here the demo model runs in all forms, with "
        "a UNet that returns random numbers made before: CPU µs of an image's step, on one thread, "
        f"medians of {results.settings['rounds']} interleaved rounds, and medians of ratios within "
        "a round with their 95 % interval.",
        table(["", *FORMS, *(f"{form} / {other}" for form, other in RATIOS)], times),
        "What the second step of a batch asks of its device besides the UNet, counted on torch's "
        "meta device. It has no values, so no form waits for one:",
        table(["", *COUNTED], counts),
    ]


def _ratio(rounds: Sequence[Mapping[str, float]], form: str, other: str) -> str:
    ratio = bootstrap_median([each[form] / each[other] for each in rounds])
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


BENCHMARK = Benchmark(
    name="suspension",
    title="Suspended pipelines beside the loop written by hand",
    command="python -m bench.micro suspension",
    amounts={
        "rounds": Amount(40, 2, "runs of each form, in turns"),
        "steps": Amount(40, 5, "steps of each run"),
    },
    measure=measure,
    describe=describe,
)
