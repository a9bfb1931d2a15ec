"""A sample: one image that is being generated."""

import inspect
from typing import Any

import torch

from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey
from darkroom_server.engine.batch import Group
from darkroom_server.engine.components.guidance import guide
from darkroom_server.engine.components.prompt_encoder import Embedding


class Sample:
    """The latents of one image, its noise generator, its noise scheduler and its step counter.

    ``embeddings`` has one entry per row: the prompt's, or the negative prompt's and the prompt's.
    The first latents and all later noise come from the sample's own generator on the CPU, so a
    seed means the same on every device. ``predicted_x0`` are the final latents that the denoiser
    predicts, set only if a preview is due. ``preview_pending`` is True while one is encoded.
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
    ) -> None:
        self.job = job
        self.index = index
        self.embeddings = embeddings
        self.scheduler = scheduler
        self.seed = job.seed_of(index)
        self.step = 0
        self.rows_in_last_batch = 0
        self.engine_seconds = 0.0
        self.predicted_x0: torch.Tensor | None = None
        self.preview_pending = False
        # On the CPU: reading a timestep must not wait for the device.
        scheduler.set_timesteps(job.steps, device="cpu")
        self._timesteps = scheduler.timesteps
        self._generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn((1, *latent_shape), generator=self._generator, dtype=dtype)
        self.latents = noise.to(device) * scheduler.init_noise_sigma
        accepted = inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"eta": 0.0, "generator": self._generator}
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
    def prompt_truncated(self) -> bool:
        """True if the end of the prompt or of the negative prompt was cut off."""
        return any(embedding.truncated for embedding in self.embeddings)

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next denoiser call, a scalar on the CPU."""
        return self._timesteps[self.step]  # type: ignore[no-any-return]

    @property
    def group(self) -> Group:
        """The group of samples that can share a batch with this one."""
        job = self.job
        return Group(job.model, job.width, job.height, self.embeddings[0].hidden.shape[1])

    def key(self) -> OrderKey:
        """The plain key by which ``core.order`` ranks this sample."""
        return OrderKey(
            id=(self.job.id, self.index),
            submitted_at=self.job.submitted_at,
            remaining_steps=self.steps - self.step,
            priority=self.job.priority,
            deadline=self.job.deadline,
            rows=self.rows,
            alone=self.job.exact,
        )

    def denoiser_input(self) -> torch.Tensor:
        """The latents as the denoiser takes them at this timestep, [1, channels, height, width]."""
        return self.scheduler.scale_model_input(self.latents, self.timestep)  # type: ignore[no-any-return]

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step: ``prediction`` is the denoiser's, one row per embedding."""
        if self.rows == 2:
            prediction = guide(prediction, self.job.guidance_scale)
        if self.job.wants_preview(self.step + 1, self.steps):
            self.predicted_x0 = self._predict_x0(prediction)
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, **self._extra, return_dict=False
        )[0]
        self.step += 1

    def _predict_x0(self, prediction: torch.Tensor) -> torch.Tensor:
        """The final latents that ``prediction`` implies, with one formula for every scheduler.

        The denoiser's input is scaled to preserve variance, whatever the scheduler's own scale is.
        So the equations are those of Song et al. 2020 (epsilon) and Salimans and Ho 2022 (v).
        """
        noisy, predicted = self.denoiser_input().float(), prediction.float()
        signal = float(self.scheduler.alphas_cumprod[round(float(self.timestep))])
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return predicted
        if kind == "v_prediction":
            return signal**0.5 * noisy - (1 - signal) ** 0.5 * predicted  # type: ignore[no-any-return]
        return (noisy - (1 - signal) ** 0.5 * predicted) / max(signal, 1e-4) ** 0.5  # type: ignore[no-any-return]
