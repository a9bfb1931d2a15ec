"""Starts the samples of jobs: each is a run of a hosted pipeline, up to its first step."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from darkroom_server.core.job import Job, SchedulerName, Task
from darkroom_server.engine.adapters.model_adapters import (
    ModelAdapters,
    encoder_mix,
    encoding,
    group_key,
)
from darkroom_server.engine.adapters.weights import Mix
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder, JobImageEncoder
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.controls.model_controls import ModelControls, controlled, controls_of
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, run_denoiser
from darkroom_server.engine.pipelines.arguments import ArgumentSpec
from darkroom_server.engine.pipelines.calls import DenoiserCall, EncodeCall, EncodeImageCall
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.sample import SuspendedSample
from darkroom_server.engine.sample import Sample

NOTHING: Mapping[str, Any] = MappingProxyType({})


class PromptFailed(Exception):
    """A text encoder failed; ``error`` says how."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """What the runs of one model have in common.

    ``hosts`` are the pipelines by task, the model's own first; they share their modules. ``spec``
    says how denoiser calls are merged, None: they are not. ``arguments_of`` are those of the
    pipeline's call for a job. ``vae_latents`` turns what a scheduler steps for a job into the VAE's
    latents [1, channels, h, w], for previews. ``schedulers`` are templates, by name. ``own`` are
    further components that each run has a copy of. ``images`` encodes input images, None if the
    model takes none. ``adapters`` and ``controls`` are those of its jobs. ``ip_adapter`` is None
    without one, ``forms`` if the denoiser always runs eagerly.
    """

    hosts: Mapping[Task, HostedPipeline]
    spec: ArgumentSpec | None
    arguments_of: Callable[[Job], Mapping[str, Any]]
    vae_latents: Callable[[torch.Tensor, Job], torch.Tensor]
    schedulers: dict[SchedulerName, Any]
    own: Mapping[str, Any]
    precision: Callable[[], AbstractContextManager[Any]]
    images: ImageEncoder | None = None
    adapters: ModelAdapters | None = None
    ip_adapter: IpAdapter | None = None
    controls: ModelControls | None = None
    forms: DenoiserForms | None = None

    @property
    def host(self) -> HostedPipeline:
        """The pipeline of the model's own task."""
        return next(iter(self.hosts.values()))

    def start_all(
        self,
        job: Job,
        *,
        steps: int,
        prompt_truncated: bool,
        given: Mapping[str, Any] = NOTHING,
    ) -> tuple[list[SuspendedSample], int]:
        """A sample for each of ``job.image_indices``, as ``start``, and the prompts encoded."""
        samples: list[SuspendedSample] = []
        prompts = 0
        images = None if self.images is None else JobImageEncoder(self.images)
        try:
            for index in job.image_indices:
                sample, encoded = self.start(
                    job,
                    index,
                    steps=steps,
                    prompt_truncated=prompt_truncated,
                    given=given,
                    images=images,
                )
                samples.append(sample)
                prompts += encoded
        except BaseException:
            for sample in samples:
                sample.close()
            raise
        return samples, prompts

    def start(
        self,
        job: Job,
        index: int,
        *,
        steps: int,
        prompt_truncated: bool = False,
        given: Mapping[str, Any] = NOTHING,
        images: JobImageEncoder | None = None,
    ) -> tuple[SuspendedSample, int]:
        """The sample of image ``index`` at its first step, and the prompts encoded for it.

        ``steps`` are the denoiser calls that it is expected to make. ``given`` are further
        arguments of the pipeline's call. ``images`` encodes the input images, once for
        all images of the job; None: for this one. Raises ``PromptFailed``, ``ImageNotEncoded``, and
        what the pipeline raises.
        """
        # A copy is faster than a new scheduler.
        scheduler = copy.deepcopy(self.schedulers[job.scheduler])
        # Images of exact jobs are diffusers' own to the last bit.
        scheduler.merges = self.spec is not None and not job.exact
        sample = SuspendedSample(
            job,
            index,
            scheduler=scheduler,
            steps=steps,
            spec=self.spec,
            vae_latents=self.vae_latents,
            prompt_truncated=prompt_truncated,
            device=self.host.device,
            adapter_key=group_key(self.adapters, job),
        )
        mix = encoder_mix(self.adapters, job)
        arguments = {**self.arguments_of(job), **given, "generator": sample.generator}
        own: dict[str, Any] = {name: copy.deepcopy(part) for name, part in self.own.items()}
        encoded = 0
        try:
            # First, as diffusers: a control image may take noise from the sample's generator.
            sample.controls = controls_of(self.controls, sample)
            host = self.hosts[job.task]
            sample.start(host.run(scheduler, arguments, own, job.prompt_syntax, mix))
            while isinstance(call := sample.pending, EncodeCall | EncodeImageCall):
                if isinstance(call, EncodeCall):
                    sample.resume(self._encode(call, mix))
                    encoded += 1
                else:
                    encode = self.encode_image if images is None else images.encode
                    sample.resume(encode(call.images, call.options))
        except BaseException:
            sample.close()
            raise
        return sample, encoded

    def denoise(self, calls: Sequence[DenoiserCall], samples: Sequence[Sample]) -> list[Any]:
        """One denoiser call: what the denoiser returns for each of ``calls``, of equal keys.

        Each is of one of ``samples``, whose ControlNets run before.
        """
        module, spec = calls[0].module, self.spec
        if len(calls) == 1:
            # As the pipeline calls it: alone, an image is the pipeline's own to the last bit.
            arguments = calls[0].arguments
            given = arguments if spec is None else spec.alone(arguments)
            given = controlled(self.controls, given, samples)
            return [self.call_denoiser(module, given, samples)]
        assert spec is not None, "without a spec, each sample is a group of its own"
        given = spec.collate([call.arguments for call in calls])
        output = self.call_denoiser(module, controlled(self.controls, given, samples), samples)
        return list(spec.split(output, [spec.rows(call.arguments) for call in calls]))

    def encode_image(self, images: torch.Tensor, options: Mapping[str, Any]) -> Any:
        """As ``ImageEncoder.encode``."""
        assert self.images is not None, "the model takes no images"
        return self.images.encode(images, options)

    def encode_once(self, job: Job) -> bool:
        """Encode a prompt of ``job`` and keep nothing of it; False if its prompt is cached.

        Raises ``PromptFailed``, and what the pipeline raises.
        """
        run = self.host.run(
            copy.deepcopy(self.schedulers[job.scheduler]),
            {**self.arguments_of(job), "generator": torch.Generator("cpu").manual_seed(0)},
            {name: copy.deepcopy(part) for name, part in self.own.items()},
        )
        try:
            call = run.start()
            if not isinstance(call, EncodeCall):
                return False
            self._encode(call, ())
            return True
        finally:
            run.end()

    def why_unusable(self, job: Job, output: Any, calls: int) -> str:
        """Why the pipeline cannot run with the scheduler of ``job``, empty if it can.

        ``output`` is the denoiser's for each of the ``calls`` calls of the first step.
        """
        try:
            sample, _ = self.start(job, 0, steps=job.steps)
        except (ValueError, TypeError) as error:
            # The pipeline asks for what this scheduler does not take, such as sigmas.
            return str(error)
        before = global_generators(self.host.device)
        try:
            for _ in range(calls):
                sample.advance(output)
        finally:
            sample.close()
        if not torch.equal(before, global_generators(self.host.device)):
            return "it takes noise from the global generator, which no seed repeats"
        return ""

    def call_denoiser(
        self, module: Any, arguments: Mapping[str, Any], samples: Sequence[Sample] = ()
    ) -> Any:
        """What ``module``, a denoiser, returns for ``arguments``, in this model's precision.

        They are the rows of ``samples``.
        """
        with self.precision():
            return run_denoiser(self.forms, module, arguments, samples)

    def _encode(self, call: EncodeCall, mix: Mix) -> Any:
        try:
            with self.precision(), encoding(self.adapters, mix):
                return call.run()
        except Exception as error:
            raise PromptFailed(error) from error


def global_generators(device: torch.device) -> torch.Tensor:
    """The state of the generators that code without its own uses: the CPU's and ``device``'s."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
