"""A run of a scheduler whose steps are merged: which step is next, and what it takes."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from darkroom_server.engine.stepping.linear_steps import LinearSteps
from darkroom_server.engine.stepping.merged_step import LinearStep


class OutOfOrder(RuntimeError):
    """A pipeline took its steps in another order than its scheduler's timesteps have."""


class LinearRun:
    """One sample's way through ``steps``; ``generator`` makes its noise."""

    def __init__(self, steps: LinearSteps, generator: Any) -> None:
        self._steps = steps
        self._generator = generator
        self._next = 0
        self._kept: torch.Tensor | None = None

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """``latents`` as the denoiser takes them at the next step."""
        scale = self._steps.scales[self._next]
        return latents if scale == 1.0 else latents * scale

    def begin(self, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor) -> LinearStep:
        """The step at ``timestep``. Raises ``OutOfOrder`` if another one is next."""
        steps, place = self._steps, self._next
        if place == len(steps) or float(timestep) != steps.timesteps[place]:
            raise OutOfOrder(f"step {place} of {len(steps)} at timestep {float(timestep)}")
        inputs = [latents.reshape(1, -1)]
        if steps.kept:
            if self._kept is None:
                self._kept = torch.zeros((steps.kept, latents.numel()), device=latents.device)
            inputs.append(self._kept)
        inputs.append(prediction.reshape(1, -1))
        if steps.takes_noise:
            inputs.append(noise_of(steps, place, prediction, self._generator).reshape(1, -1))
        return LinearStep(steps.matrices[place], tuple(inputs))

    def finish(self, result: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The next latents, like ``latents``; ``result`` is that of the step."""
        self._next += 1
        if self._steps.kept:
            self._kept = result[1:]
        return result[0].view(latents.shape).to(latents.dtype)


def noise_of(
    steps: LinearSteps, place: int, prediction: torch.Tensor, generator: Any
) -> torch.Tensor:
    """What step ``place`` takes from ``generator``, as diffusers would; zeros if nothing.

    It is on the CPU, so that the noise of a batch is copied to the device at once.
    """
    dtype = steps.noise_dtype or prediction.dtype
    if not steps.noisy[place]:
        return torch.zeros(prediction.shape, dtype=dtype)
    noise: torch.Tensor = randn_tensor(prediction.shape, generator=generator, dtype=dtype)
    return noise
