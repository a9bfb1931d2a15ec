"""A sample: one image that is being generated."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey
from darkroom_server.engine.batch import Group
from darkroom_server.engine.controls.sample_control import SampleControl
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps


class Sample(ABC):
    """One image: its noise generator, its noise scheduler and its step counter.

    The first latents and all later noise come from the sample's own generator on the CPU, so a
    seed means the same on every device. ``step`` counts denoiser calls. ``predicted_x0`` are the
    final latents that the denoiser predicts, set only if a preview is due. ``preview_pending`` is
    True while one is encoded. ``controls`` are its ControlNets; its model sets them.
    ``first_prompts`` are what they read of the first denoiser call of a step that has several.
    ``memory_fallbacks`` are names of what was done otherwise than the model's runtime says, because
    memory was short: see ``ReplayRecord`` of the protos.
    """

    def __init__(self, job: Job, index: int, scheduler: Any) -> None:
        self.job = job
        self.index = index
        self.scheduler = scheduler
        self.seed = job.seed_of(index)
        self.step = 0
        self.rows_in_last_batch = 0
        self.engine_seconds = 0.0
        self.predicted_x0: torch.Tensor | None = None
        self.preview_pending = False
        self.memory_fallbacks: set[str] = set()
        self.controls: Sequence[SampleControl] = ()
        self.first_prompts: Mapping[str, torch.Tensor] = {}
        self.generator = torch.Generator("cpu").manual_seed(self.seed)

    @property
    @abstractmethod
    def steps(self) -> int:
        """Denoiser calls from noise to image; some schedulers make more than one a step."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """True once the latents are ready to be decoded."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows that this sample takes in the next batch."""

    @property
    @abstractmethod
    def group(self) -> Group:
        """The group of samples that can share the next batch with this one."""

    @property
    @abstractmethod
    def latents(self) -> torch.Tensor:
        """The latents as they are now."""

    @property
    @abstractmethod
    def prompt_truncated(self) -> bool:
        """True if the end of the prompt or of the negative prompt was cut off."""

    @abstractmethod
    def begin_step(self, prediction: Any) -> LinearStep | None:
        """Take one step, or begin one that can be merged with those of other samples.

        ``prediction`` is the denoiser's output for this sample's rows. A step that is returned is
        not taken before ``finish_step``.
        """

    @abstractmethod
    def finish_step(self, result: torch.Tensor) -> None:
        """End the step that ``begin_step`` returned; ``result`` is as of ``take_steps``."""

    def advance(self, prediction: Any) -> None:
        """Take one step alone; ``prediction`` as for ``begin_step``."""
        step = self.begin_step(prediction)
        if step is not None:
            self.finish_step(take_steps([step])[0])

    def controls_at(self, call: int, calls_per_step: int) -> list[SampleControl]:
        """Its ControlNets that change denoiser call ``call``, from 0."""
        step, steps = call // calls_per_step, self.steps // calls_per_step
        return [each for each in self.controls if each.applies(step, steps)]

    def held_bytes(self) -> int:
        """Bytes that this sample holds between its batches, without those that are few."""
        return sum(control.bytes for control in self.controls)

    def close(self) -> None:  # noqa: B027 - most samples hold nothing but memory.
        """Free what the sample holds; called on the loop's thread, any number of times."""

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
            adapters=frozenset(lora.id for lora in self.job.active_loras),
        )


def predict_x0(
    scheduler: Any, prediction: torch.Tensor, timestep: Any, noisy: torch.Tensor
) -> torch.Tensor:
    """The final latents that the guided ``prediction`` implies, one formula for each kind of model.

    ``noisy`` are the latents as the denoiser takes them at ``timestep``, [1, ...]. A denoiser's
    input for diffusion is scaled to preserve variance, whatever the scheduler's own scale is. So
    the equations are those of Song et al. 2020 (epsilon) and Salimans and Ho 2022 (v).
    """
    noisy, predicted = noisy.float(), prediction.float()
    kind = scheduler.config.get("prediction_type")
    if kind == "sample":
        return predicted
    if not hasattr(scheduler, "alphas_cumprod"):
        # Flow matching (Lipman et al. 2022): the timestep is the share of noise.
        share = float(timestep) / scheduler.config.num_train_timesteps
        return noisy - share * predicted  # type: ignore[no-any-return]
    signal = float(scheduler.alphas_cumprod[round(float(timestep))])
    if kind == "v_prediction":
        return signal**0.5 * noisy - (1 - signal) ** 0.5 * predicted  # type: ignore[no-any-return]
    return (noisy - (1 - signal) ** 0.5 * predicted) / max(signal, 1e-4) ** 0.5  # type: ignore[no-any-return]
