"""A model in memory: the parts of a diffusers pipeline that the loop calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.decoder import Decoder
from darkroom_server.engine.denoiser import Denoiser
from darkroom_server.engine.previews import Previewer
from darkroom_server.engine.prompts import Embedding, PromptEncoder
from darkroom_server.engine.safety import SafetyChecker
from darkroom_server.engine.sample import Group, Sample
from darkroom_server.engine.schedulers import make_scheduler
from darkroom_server.engine.tally import Counts


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """One model, ready to develop samples; ``scheduler_config`` is the folder's own."""

    info: ModelInfo
    prompts: PromptEncoder
    denoiser: Denoiser
    decoder: Decoder
    previewer: Previewer
    safety: SafetyChecker | None
    scheduler_config: dict[str, Any]
    latent_channels: int
    latent_factor: int
    device: torch.device
    dtype: torch.dtype

    @property
    def counts(self) -> tuple[Counts, ...]:
        """What the parts count."""
        return (self.prompts.counts, self.denoiser.counts, self.decoder.counts)

    def prompts_of(self, job: Job) -> list[tuple[str, bool]]:
        """What must be encoded for each row of an image: (prompt, alone), in the rows' order."""
        texts = [job.negative_prompt] if job.rows_per_image == 2 else []
        return [(text, job.exact) for text in [*texts, job.prompt]]

    def max_rows(self, group: Group) -> int:
        """Rows that a pass of ``group`` may have, by its size and by what passes showed."""
        fit = self.info.memory.rows_that_fit(
            group.latent_width * self.latent_factor, group.latent_height * self.latent_factor
        )
        return min(self.denoiser.max_rows, fit)

    def new_samples(
        self, job: Job, embeddings: Mapping[tuple[str, bool], Embedding]
    ) -> list[Sample]:
        """The images of ``job``, all noise; ``embeddings`` hold what ``prompts_of`` names."""
        shape = (
            self.latent_channels,
            job.height // self.latent_factor,
            job.width // self.latent_factor,
        )
        rows = tuple(embeddings[key] for key in self.prompts_of(job))
        if any(embedding.truncated for embedding in rows):
            self.prompts.counts[Counted.PROMPTS_TRUNCATED] += 1
        return [
            Sample(
                job,
                index,
                scheduler=make_scheduler(job.scheduler, self.scheduler_config),
                embeddings=rows,
                latent_shape=shape,
                device=self.device,
                dtype=self.dtype,
            )
            for index in job.image_indices
        ]
