"""diffusers' own pipeline, alone: the reference for every served image."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from darkroom_server.core.job import Job, SchedulerName

CLASSES: dict[SchedulerName, tuple[str, dict[str, Any]]] = {
    SchedulerName.DDIM: ("DDIMScheduler", {}),
    SchedulerName.DDPM: ("DDPMScheduler", {}),
    SchedulerName.PNDM: ("PNDMScheduler", {}),
    SchedulerName.LMS: ("LMSDiscreteScheduler", {}),
    SchedulerName.EULER: ("EulerDiscreteScheduler", {}),
    SchedulerName.EULER_ANCESTRAL: ("EulerAncestralDiscreteScheduler", {}),
    SchedulerName.HEUN: ("HeunDiscreteScheduler", {}),
    SchedulerName.DPMPP_2M: ("DPMSolverMultistepScheduler", {}),
    SchedulerName.DPMPP_2M_KARRAS: ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    SchedulerName.DPMPP_2M_SDE: (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    SchedulerName.DPMPP_2M_SDE_KARRAS: (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    SchedulerName.UNIPC: ("UniPCMultistepScheduler", {}),
    SchedulerName.DEIS: ("DEISMultistepScheduler", {}),
    SchedulerName.LCM: ("LCMScheduler", {}),
    SchedulerName.MODEL: ("DDIMScheduler", {}),
}
"""Written from diffusers' documentation, and not from the server's own table."""


class Reference:
    """``StableDiffusionPipeline`` on a folder, called as its users call it."""

    def __init__(self, folder: Path) -> None:
        # The threads share out sums, and with them the last bits: as many as the loop's.
        torch.set_num_threads(1)
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self._config = self.pipeline.scheduler.config

    def latents(self, job: Job, index: int = 0) -> torch.Tensor:
        """The final latents of one image of ``job``."""
        return self._call(job, index, "latent")  # type: ignore[no-any-return]

    def pixels(self, job: Job, index: int = 0) -> NDArray[np.uint8]:
        """The pixels of one image of ``job``, [height, width, 3]."""
        return np.asarray(self._call(job, index, "pil")[0])

    def _call(self, job: Job, index: int, output_type: str) -> Any:
        name, settings = CLASSES[job.scheduler]
        self.pipeline.scheduler = getattr(diffusers, name).from_config(self._config, **settings)
        return self.pipeline(
            job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed_of(index)),
            output_type=output_type,
        ).images
