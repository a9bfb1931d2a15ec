"""What a family's test needs to know about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from darkroom_server.core.job import Job

PROMPTS = (
    "a large yellow star on a blue background",
    "a red ring",
    "a small heart on a white background",
    "a green star",
    "a blue circle and a red star",
)
STEPS = (5, 8, 3, 6, 7)
SCALES = (7.5, 3.0, 5.0, 4.0, 2.0)


@dataclass(frozen=True, slots=True)
class FamilyCase:
    """A tiny model of a family, and jobs that share its batches.

    ``write`` saves it into a folder. ``jobs`` are fields of jobs, see ``mixed_jobs``. ``call`` are
    the arguments with which a user of diffusers asks for a job, without size, steps and generator.
    ``rows_in`` names the denoiser's argument that has a row for each prompt, and ``timestep`` that
    of its timestep: the negative controls change them. ``tolerance`` is the relative error that the
    last bits of a merged batch may cause. ``load`` are further arguments with which diffusers
    reads the folder. ``mixes_lengths``: whether prompts of different lengths share batches, None if
    all jobs' prompts have one length.
    """

    name: str
    write: Callable[[Path], Path]
    jobs: Sequence[Mapping[str, Any]]
    call: Callable[[Job], Mapping[str, Any]]
    rows_in: str = "encoder_hidden_states"
    timestep: str = "timestep"
    tolerance: float = 1e-5
    load: Mapping[str, Any] = field(default_factory=dict)
    mixes_lengths: bool | None = None


def mixed_jobs(*fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields of five jobs with different prompts, steps, guidance and seeds, and ``fields``."""
    return [
        {"prompt": prompt, "steps": steps, "guidance_scale": scale, "seed": 100 + i, **extra}
        for i, (prompt, steps, scale, extra) in enumerate(
            zip(PROMPTS, STEPS, SCALES, fields, strict=True)
        )
    ]


def alone_key(job: Job, index: int = 0) -> Job:
    """Equal for jobs whose image ``index`` is the same if diffusers generates it alone."""
    seed = job.seed_of(index)
    return replace(
        job, id="", seed=seed, image_count=1, skip=frozenset(), exact=False, submitted_at=0.0
    )


def guided_call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks a model with guidance for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or None,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length,
    }
