"""A sample whose latents the engine advances itself, with the pipeline's parts."""

import inspect
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from darkroom_server.core.job import Job
from darkroom_server.engine.batch import Group
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.guidance import guide
from darkroom_server.engine.device.transfer import send
from darkroom_server.engine.families.unet import UNET
from darkroom_server.engine.sample import Sample, predict_x0


class LatentSample(Sample):
    """The latents of one image, and its embeddings.

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
        # On the CPU: reading a timestep must not wait for the device.
        scheduler.set_timesteps(job.steps, device="cpu")
        self._timesteps = scheduler.timesteps
        noise = torch.randn((1, *latent_shape), generator=self.generator, dtype=dtype)
        self._latents = send(noise, device) * scheduler.init_noise_sigma
        accepted = inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"eta": 0.0, "generator": self.generator}
        self._extra = {name: value for name, value in extra.items() if name in accepted}
        # No argument changes its shape from step to step.
        key = UNET.group_key(self.denoiser_arguments())
        self._group = Group(job.model, job.width, job.height, key=(key, adapter_key))

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
        latents: torch.Tensor = self._latents
        return latents

    @property
    def prompt_truncated(self) -> bool:
        """True if the end of the prompt or of the negative prompt was cut off."""
        return any(embedding.truncated for embedding in self.embeddings)

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

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step: ``prediction`` is the denoiser's, one row per embedding."""
        if self.rows == 2:
            prediction = guide(prediction, self.job.guidance_scale)
        if self.job.wants_preview(self.step + 1, self.steps):
            self.predicted_x0 = predict_x0(
                self.scheduler, prediction, self.timestep, self.denoiser_input()
            )
        self._latents = self.scheduler.step(
            prediction, self.timestep, self._latents, **self._extra, return_dict=False
        )[0]
        self.step += 1
