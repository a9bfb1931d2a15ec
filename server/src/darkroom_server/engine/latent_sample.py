"""A sample whose latents the engine advances itself, with the pipeline's parts."""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from darkroom_server.core.job import Job
from darkroom_server.engine.batch import Group
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.guidance import guide
from darkroom_server.engine.device.transfer import send, send_together
from darkroom_server.engine.families.unet import UNET
from darkroom_server.engine.sample import Sample, predict_x0
from darkroom_server.engine.stepping.linear_run import noise_of
from darkroom_server.engine.stepping.linear_steps import LinearSteps, guided
from darkroom_server.engine.stepping.merged_step import LinearStep
from darkroom_server.engine.stepping.schedules import Schedules


class LatentSample(Sample):
    """The latents of one image, and its embeddings; its scheduler takes its steps.

    ``scheduler`` has its timesteps, on the CPU: reading one must not wait for the device.
    ``embeddings`` has one entry per row: the prompt's, or the negative prompt's and the prompt's,
    which are equally long. ``further_arguments`` are those of each denoiser call. ``adapter_key``
    must be equal for all rows of a batch.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        *,
        scheduler: Any,
        embeddings: tuple[Embedding, ...],
        latent_shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        further_arguments: Mapping[str, Any] = MappingProxyType({}),
        adapter_key: Hashable = None,
    ) -> None:
        super().__init__(job, index, scheduler)
        self.embeddings = embeddings
        self._further_arguments = further_arguments
        self._timesteps = scheduler.timesteps
        self._numbers: list[float] = scheduler.timesteps.tolist()
        noise = torch.randn((1, *latent_shape), generator=self.generator, dtype=dtype)
        self._start(send(noise, device) * scheduler.init_noise_sigma)
        # No argument changes its shape from step to step.
        key = UNET.group_key(self.denoiser_arguments())
        self._group = Group(job.model, job.width, job.height, key=(key, adapter_key))

    def _start(self, latents: torch.Tensor) -> None:
        self._latents = latents
        accepted = inspect.signature(self.scheduler.step).parameters
        extra: dict[str, Any] = {"eta": 0.0, "generator": self.generator}
        self._extra = {name: value for name, value in extra.items() if name in accepted}

    @property
    def steps(self) -> int:
        """Denoiser calls from noise to image; some schedulers make more than one a step."""
        return len(self._timesteps)

    @property
    def done(self) -> bool:
        """True once the latents are ready to be decoded."""
        return self.step >= self.steps

    @property
    def rows(self) -> int:
        """Rows that this sample takes in a batch."""
        return len(self.embeddings)

    @property
    def group(self) -> Group:
        """The group of samples that can share a batch with this one."""
        return self._group

    @property
    def latents(self) -> torch.Tensor:
        """The latents as they are now, [1, channels, height, width]."""
        return self._latents

    @property
    def prompt_truncated(self) -> bool:
        """True if the end of the prompt or of the negative prompt was cut off."""
        return any(embedding.truncated for embedding in self.embeddings)

    @property
    def timestep_number(self) -> float:
        """The value of ``timestep``."""
        return self._numbers[self.step]

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next denoiser call, a scalar on the CPU."""
        return self._timesteps[self.step]  # type: ignore[no-any-return]

    def denoiser_input(self) -> torch.Tensor:
        """The latents as the denoiser takes them at this timestep, [1, channels, height, width]."""
        return self.scheduler.scale_model_input(self._latents, self.timestep)  # type: ignore[no-any-return]

    def denoiser_arguments(self) -> dict[str, Any]:
        """The arguments of the next denoiser call, as diffusers' own pipeline would call it."""
        return {
            "sample": self.denoiser_input().expand(self.rows, -1, -1, -1),
            "timestep": self.timestep,
            "encoder_hidden_states": torch.cat([each.hidden for each in self.embeddings]),
            "return_dict": False,
            **self._further_arguments,
        }

    def begin_step(self, prediction: torch.Tensor) -> LinearStep | None:
        """Take one step: ``prediction`` is the denoiser's, one row per embedding."""
        prediction = self._guided(prediction)
        self._keep_preview(prediction)
        self._latents = self.scheduler.step(
            prediction, self.timestep, self._latents, **self._extra, return_dict=False
        )[0]
        self.step += 1
        return None

    def finish_step(self, result: torch.Tensor) -> None:
        """Not called: ``begin_step`` takes the whole step."""
        raise AssertionError("a scheduler that takes its own steps")

    def _guided(self, prediction: torch.Tensor) -> torch.Tensor:
        return guide(prediction, self.job.guidance_scale) if self.rows == 2 else prediction

    def _keep_preview(self, guided: torch.Tensor) -> None:
        """Predict the final latents from a ``guided`` prediction, if a preview is due."""
        if self.job.wants_preview(self.step + 1, self.steps):
            self.predicted_x0 = predict_x0(
                self.scheduler, guided, self.timestep, self.denoiser_input()
            )


class LinearSample(LatentSample):
    """A latent sample whose guidance and step are one product, merged with those of others.

    ``linear`` are the steps of ``scheduler``, which samples with equal settings share. Between its
    steps the latents are in float32. ``shape`` and ``dtype`` are those of its rows,
    and ``first`` are the latents as one row.
    """

    def __init__(self, job: Job, index: int, *, linear: LinearSteps, **fields: Any) -> None:
        self._linear = linear
        super().__init__(job, index, **fields)
        pairs = self.rows == 2
        self._matrices = guided(linear, job.guidance_scale) if pairs else linear.matrices

    def _start(self, latents: torch.Tensor) -> None:
        self.shape, self.dtype = latents.shape[1:], latents.dtype
        first = latents.float().reshape(1, -1)
        self._state = torch.cat([first, first.new_zeros(self._linear.kept, first.shape[1])])
        self.first = self._state[0]

    @property
    def latents(self) -> torch.Tensor:
        """The latents as they are now, [1, channels, height, width], in the denoiser's dtype."""
        return self.first.view(1, *self.shape).to(self.dtype)

    @property
    def scale(self) -> float:
        """What the latents are multiplied with for the denoiser at this timestep."""
        return self._linear.scales[self.step]

    def denoiser_input(self) -> torch.Tensor:
        """The latents as the denoiser takes them at this timestep, [1, channels, height, width]."""
        return (self.first * self.scale).view(1, *self.shape).to(self.dtype)

    def begin_step(self, prediction: torch.Tensor) -> LinearStep | None:
        """The step that ``prediction``, the denoiser's with one row per embedding, leads to."""
        linear, place = self._linear, self.step
        if self.job.wants_preview(place + 1, self.steps):
            self._keep_preview(self._guided(prediction))
        inputs = [self._state, prediction.reshape(self.rows, -1)]
        if linear.takes_noise:
            noise = noise_of(linear, place, prediction[:1], self.generator)
            inputs.append(noise.reshape(1, -1))
        return LinearStep(self._matrices[place], tuple(inputs))

    def finish_step(self, result: torch.Tensor) -> None:
        """Take the latents, and what the scheduler keeps, from ``result``."""
        self._state = result
        self.first = result[0]
        self.step += 1


def new_sample(job: Job, index: int, schedules: Schedules, **fields: Any) -> LatentSample:
    """Image ``index`` of ``job`` at its first step; ``fields`` are as for ``LatentSample``."""
    # Images of exact jobs are diffusers' own to the last bit.
    if not job.exact:
        shared = schedules.shared(job.scheduler, job.steps)
        if shared.linear is not None:
            return LinearSample(
                job, index, linear=shared.linear, scheduler=shared.scheduler, **fields
            )
    return LatentSample(job, index, scheduler=schedules.new(job.scheduler, job.steps), **fields)


def stack_inputs(samples: Sequence[LatentSample]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser takes for each row of ``samples``, on their device.

    Their ``denoiser_input`` [rows, channels, height, width], and their timesteps [rows] in float32.
    """
    timesteps = torch.tensor(
        [s.timestep_number for s in samples for _ in range(s.rows)], dtype=torch.float32
    )
    linear = [sample for sample in samples if isinstance(sample, LinearSample)]
    if len(linear) < len(samples):
        rows = torch.cat([s.denoiser_input().expand(s.rows, -1, -1, -1) for s in samples])
        return rows, send(timesteps, rows.device)
    first = linear[0]
    rows = torch.stack([sample.first for sample in linear for _ in range(sample.rows)])
    scales = [sample.scale for sample in linear for _ in range(sample.rows)]
    if any(scale != 1.0 for scale in scales):
        timesteps, factors = send_together([timesteps, torch.tensor(scales)], rows.device)
        rows *= factors[:, None]
    else:
        timesteps = send(timesteps, rows.device)
    return rows.view(-1, *first.shape).to(first.dtype), timesteps
