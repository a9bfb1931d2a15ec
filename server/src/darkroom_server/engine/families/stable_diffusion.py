"""A model in memory: the parts of a diffusers pipeline that the loop calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.denoiser import Denoiser
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.prompt_encoder import Embedding, PromptEncoder
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.components.schedulers import make_scheduler
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.failures import (
    PROMPT_FAILED,
    PROMPT_OUT_OF_MEMORY,
    is_fatal,
    is_out_of_memory,
)
from darkroom_server.engine.sample import Group, Sample

log = structlog.get_logger(__name__)

Embeddings = Mapping[tuple[str, bool], Embedding]
"""By (prompt, alone)."""


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

    def encode_prompts(self, jobs: Sequence[Job]) -> list[Embeddings | Failure]:
        """What ``prompts_of`` names for each job, encoded together, or why there is none.

        What fails is split and its halves are tried, down to single jobs, so that only what fails
        alone fails. Raises what means that the device is lost.
        """
        try:
            found = self.prompts.encode(key for job in jobs for key in self.prompts_of(job))
            return [found] * len(jobs)
        except Exception as error:
            if is_fatal(error):
                raise
            out_of_memory = is_out_of_memory(error)
            log.warning(
                "prompts could not be encoded",
                request_ids=sorted({job.request_id for job in jobs}),
                jobs=len(jobs),
                out_of_memory=out_of_memory,
                exc_info=not out_of_memory,
            )
        # Outside the handler, whose traceback would keep the failed batch's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        alone = len(jobs) == 1
        if out_of_memory:
            outcome = Counted.OUT_OF_MEMORY_FAILED if alone else Counted.OUT_OF_MEMORY_SPLIT
            self.prompts.counts[outcome] += 1
        if alone:
            return [PROMPT_OUT_OF_MEMORY if out_of_memory else PROMPT_FAILED]
        half = len(jobs) // 2
        return self.encode_prompts(jobs[:half]) + self.encode_prompts(jobs[half:])

    def max_rows(self, group: Group) -> int:
        """Rows that a pass of ``group`` may have, by its size and by what passes showed."""
        fit = self.info.memory.rows_that_fit(
            group.latent_width * self.latent_factor, group.latent_height * self.latent_factor
        )
        return min(self.denoiser.max_rows_of(group), fit)

    def new_samples(self, job: Job, embeddings: Embeddings) -> list[Sample]:
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
