"""Edits: what shares batches equals diffusers' own pipelines, which run alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.tiny_families.case import FamilyCase
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import Job, Task
from darkroom_server.engine.families.qwen_image_edit import PROCESSOR, ImageProcessor
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.pipelines.model import SuspendedModel

from .families.edit import CASES, shrink_references
from .families.image_tasks import picture
from .model_table import cells, check_row
from .test_family_parity import (
    NOTICEABLE,
    Served,
    first_timestep_for_all,
    prompts_swapped,
    spoil_batches,
)

OWN_TOKENS = 16
"""Of an image of 64×64 pixels; those of reference images follow."""


class ServedEdits(Served):
    """A model that edits, and diffusers' pipeline, whose images are kept."""

    def __init__(self, case: FamilyCase, folder: Path) -> None:
        if (folder / PROCESSOR).is_dir():
            load = {PROCESSOR: ImageProcessor.from_pretrained(folder / PROCESSOR)}
            case = replace(case, load=load)
        super().__init__(case, folder)
        self.batches: list[list[tuple[Task, int]]] = []
        self._wanted: dict[Job, tuple[torch.Tensor, NDArray[np.uint8]]] = {}

    @property
    def model(self) -> SuspendedModel:
        """The served model."""
        return cast("SuspendedModel", self.loop.models["tiny"])

    def wanted(self, job: Job) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """diffusers' latents and pixels of ``job``."""
        key = replace(job, id="", submitted_at=0.0, exact=False)
        if key not in self._wanted:
            self._wanted[key] = self.alone.image(job)
        return self._wanted[key]

    def error(self, job: Job, of: Job | None = None) -> float:
        """How far ``job``'s latents are from the pipeline's, relative to the largest value."""
        wanted, _ = self.wanted(of or job)
        found = self.loop.latents[job.id, 0]
        return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedEdits]:
    torch.set_num_threads(1)
    case: FamilyCase = request.param
    with pytest.MonkeyPatch.context() as patch:
        shrink_references(patch)
        made = ServedEdits(case, case.write(tmp_path_factory.mktemp("family")))
        denoise = SuspendedModel.denoise

        def keep(self: Any, samples: Any) -> Any:
            jobs = [sample.job for sample in samples]
            made.batches.append([(job.task, len(job.reference_images)) for job in jobs])
            return denoise(self, samples)

        patch.setattr(SuspendedModel, "denoise", keep)
        yield made
        made.loop.close()


def test_the_model_offers_the_task(served: ServedEdits) -> None:
    info = served.model.info
    assert Task.EDIT in info.tasks
    assert "reference_images" in info.optional_fields
    assert not info.optional_fields & {"image", "mask_image", "strength"}
    most = max(len(job.reference_images) for job in served.jobs("most"))
    assert most <= info.limits.max_reference_images <= 4
    starts_from_text = any(not job.reference_images for job in served.jobs("text"))
    assert (Task.TEXT_TO_IMAGE in info.tasks) is starts_from_text
    assert info.unbatched_reason == ""


def test_latents_equal_the_pipelines(served: ServedEdits) -> None:
    served.batches.clear()
    jobs = served.jobs("mixed")
    served.run_with_late_arrivals(jobs)
    # On a busy machine a late one may find the first of its kind finished.
    together = served.jobs("together")
    served.loop.run(*together)
    assert max(map(served.error, [*jobs, *together])) <= served.case.tolerance
    shared = {batch[0] for batch in served.batches if len(batch) >= 2}
    kinds = [(job.task, len(job.reference_images)) for job in jobs]
    assert shared == {kind for kind in kinds if kinds.count(kind) >= 2}
    # Images of other numbers of tokens are in batches of their own.
    assert all(len(set(batch)) == 1 for batch in served.batches)


def references_swapped(case: FamilyCase, merged: dict[str, Any]) -> None:
    own, others = merged["hidden_states"].split(
        [OWN_TOKENS, merged["hidden_states"].shape[1] - OWN_TOKENS], dim=1
    )
    merged["hidden_states"] = torch.cat([own, others.flip(0)], dim=1)


@pytest.mark.parametrize("spoil", [first_timestep_for_all, prompts_swapped, references_swapped])
def test_a_wrong_batch_is_noticed(
    served: ServedEdits,
    spoil: Callable[[FamilyCase, dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_batches(monkeypatch, partial(spoil, served.case))
    jobs = served.jobs(spoil.__name__)
    served.run_with_late_arrivals(jobs)
    assert max(map(served.error, jobs)) > NOTICEABLE


def test_exact_images_have_the_pipelines_bytes(served: ServedEdits) -> None:
    jobs = served.jobs("exact", exact=True)
    served.loop.run(*jobs, *served.jobs("crowd"))
    for job in jobs:
        _, wanted = served.wanted(job)
        data = served.loop.image(job.id).image.data
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        assert np.array_equal(found, wanted), np.abs(found.astype(int) - wanted.astype(int)).max()
    other = replace(jobs[0], reference_images=(picture(9), *jobs[0].reference_images[1:]))
    assert served.error(jobs[0], of=other) > NOTICEABLE


def test_each_number_of_reference_images_has_its_own_shape(served: ServedEdits) -> None:
    """A reference image of another shape is scaled as the pipeline does it."""
    job = next(job for job in served.jobs("shape") if len(job.reference_images) == 1)
    square = picture(7, size=128)
    wide = replace(square, height=64, pixels=square.pixels[: 128 * 64 * 3])
    jobs = [job, replace(job, id="wide", reference_images=(wide,))]
    ends = served.loop.run(*jobs)
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert max(map(served.error, jobs)) <= served.case.tolerance


def test_the_row_of_the_table(served: ServedEdits) -> None:
    model = served.model
    found = cells(model.info, model.runs.spec, family_of(served.alone.pipeline).size)
    check_row(served.case.name, found)


def test_a_prompt_is_encoded_again_only_for_other_images(served: ServedEdits) -> None:
    job = next(job for job in served.jobs("memo") if len(job.reference_images) == 1)
    job = replace(
        job,
        prompt="a prompt that nothing else has",
        guidance_scale=1.0,
        true_cfg_scale=1.0,
        negative_prompt="",
        steps=2,
    )
    memo = served.model.runs.host.memo
    kept = []
    for id, seed in (("first", 1), ("again", 1), ("other", 2)):
        served.loop.run(replace(job, id=id, reference_images=(picture(seed),)))
        kept.append(len(memo._found))
    first, again, other = kept
    assert again == first
    sees_images = hasattr(served.alone.pipeline, PROCESSOR)
    assert other == first + sees_images
