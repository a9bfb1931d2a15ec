"""One image being developed."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey
from darkroom_server.engine.components.prompt_encoder import Embedding


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one group can share a pass: same model, same shapes."""

    model: str
    latent_height: int
    latent_width: int
    tokens: int


class Sample:
    """The latents of one image, its noise, its scheduler, and how far it is.

    ``embeddings`` are one per row: the prompt's alone, or the negative prompt's and the prompt's.
    The first latents, and all later noise, are drawn on the CPU from the sample's own generator,
    so that a seed means the same on every device. ``clean`` are the latents that the denoiser
    expects in the end, where a preview is due; ``previewing`` says that one is being encoded.
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
        self.rows_in_last_pass = 0
        self.engine_seconds = 0.0
        self.clean: torch.Tensor | None = None
        self.previewing = False
        # On the CPU, so that looking a timestep up never waits for the device.
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
        """Denoiser calls from noise to image: some schedulers make more than was asked for."""
        return len(self._timesteps)

    @property
    def done(self) -> bool:
        """True once the latents are ready to be decoded."""
        return self.step >= self.steps

    @property
    def rows(self) -> int:
        """Rows that this sample takes in a pass."""
        return len(self.embeddings)

    @property
    def prompt_truncated(self) -> bool:
        """True where the end of the prompt or the negative prompt was ignored."""
        return any(embedding.truncated for embedding in self.embeddings)

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next denoiser call, a scalar on the CPU."""
        return self._timesteps[self.step]  # type: ignore[no-any-return]

    @property
    def group(self) -> Group:
        """What this sample can share a pass with."""
        _, _, height, width = self.latents.shape
        return Group(self.job.model, height, width, self.embeddings[0].hidden.shape[1])

    def key(self) -> OrderKey:
        """What the order needs to know."""
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
            # Classifier-free guidance, Ho and Salimans 2022, as in diffusers' pipeline.
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.job.guidance_scale * (conditional - unconditional)
        if self.job.wants_preview(self.step + 1, self.steps):
            self.clean = self._expected(prediction)
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, **self._extra, return_dict=False
        )[0]
        self.step += 1

    def _expected(self, prediction: torch.Tensor) -> torch.Tensor:
        """What ``prediction`` says of the finished latents, the same for every scheduler.

        The denoiser sees the latents with their variance kept, whatever the scheduler's own scale
        is: so these are the equations of Song et al. 2020 (epsilon), Salimans and Ho 2022 (v).
        """
        noisy, predicted = self.denoiser_input().float(), prediction.float()
        signal = float(self.scheduler.alphas_cumprod[round(float(self.timestep))])
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return predicted
        if kind == "v_prediction":
            return signal**0.5 * noisy - (1 - signal) ** 0.5 * predicted  # type: ignore[no-any-return]
        return (noisy - (1 - signal) ** 0.5 * predicted) / max(signal, 1e-4) ** 0.5  # type: ignore[no-any-return]
