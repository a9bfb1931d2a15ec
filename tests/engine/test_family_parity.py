"""Every family: what shares batches equals diffusers' own pipeline, which runs alone."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.tiny_families import CASES
from bench.tiny_families.case import FamilyCase, alone_key
from darkroom_server.core.events import BatchDone, JobFinished, PreviewReady
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.pipelines import encode_memo
from darkroom_server.engine.pipelines.arguments import ArgumentSpec
from darkroom_server.engine.pipelines.model import SuspendedModel

from .conftest import FEW_ROWS, LoopUnderTest, config_for, make_job
from .model_table import cells, check_row

NOTICEABLE = 1e-3
"""A wrong batch is further off than this: otherwise the comparison would not notice it."""


class Alone:
    """diffusers' own pipeline on a folder, called as its users call it, once for equal jobs."""

    def __init__(self, case: FamilyCase, folder: Any) -> None:
        self._case = case
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **case.load)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                # torch multiplies strided inputs in another order by weights that want gradients.
                part.requires_grad_(False)
        self._latents: list[torch.Tensor] = []
        self._images: dict[Job, tuple[torch.Tensor, NDArray[np.uint8]]] = {}
        decode = self.pipeline.vae.decode

        def keep(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._latents.append(z)
            return decode(z, *args, **kwargs)

        self.pipeline.vae.decode = keep

    def image(self, job: Job) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """What the VAE decodes for ``job``, and the pixels."""
        key = alone_key(job)
        if key not in self._images:
            self._images[key] = self.generate(job)
        return self._images[key]

    def generate(self, job: Job) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """What ``image`` keeps; calls the pipeline."""
        # A new scheduler each time: some keep state from run to run.
        self.pipeline.scheduler = copy.deepcopy(self.pipeline.scheduler)
        image = self.pipeline(
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            output_type="pil",
            **self._case.call(job),
        ).images[0]
        return self._latents.pop(), np.asarray(image)


class Served:
    """The model of a case in a loop, and the jobs that it ran."""

    def __init__(self, case: FamilyCase, folder: Any, **config: Any) -> None:
        self.case = case
        self.alone = Alone(case, folder)
        self.loop = LoopUnderTest(config_for(folder, **{"rows": FEW_ROWS, **config}))

    def jobs(self, name: str, **fields: Any) -> list[Job]:
        """The case's jobs, with ids that start with ``name``."""
        defaults = self.loop.models["tiny"].info.defaults
        size = {"width": defaults.width, "height": defaults.height}
        usual = {**size, "scheduler": SchedulerName.MODEL}
        return [
            make_job(f"{name}-{i}", **{**usual, **each, **fields})
            for i, each in enumerate(self.case.jobs)
        ]

    def run_with_late_arrivals(self, jobs: list[Job]) -> None:
        """Run ``jobs``; each after the first two arrives when the one before has taken a step."""
        waiting = jobs[2:]

        def submit_next(_: object) -> None:
            if waiting and self.loop.progress(jobs[-len(waiting) - 1].id):
                self.loop.loop.submit(waiting.pop(0))

        self.loop.on_event = submit_next
        try:
            for job in jobs[:2]:
                self.loop.loop.submit(job)
            self.loop.wait_for(lambda: all(job.id in self.loop.ends for job in jobs))
        finally:
            self.loop.on_event = lambda _: None
        for job in jobs:
            assert isinstance(self.loop.ends[job.id], JobFinished), self.loop.ends[job.id]

    def errors(self, jobs: list[Job]) -> list[float]:
        """How far each job's latents are from the pipeline's, relative to the largest value."""
        errors = []
        for job in jobs:
            wanted, _ = self.alone.image(job)
            found = self.loop.latents[job.id, 0]
            errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
        return errors


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    torch.set_num_threads(1)
    case: FamilyCase = request.param
    made = Served(case, case.write(tmp_path_factory.mktemp("family")))
    yield made
    made.loop.close()


def test_latents_equal_the_pipelines(served: Served) -> None:
    assert served.loop.models["tiny"].info.unbatched_reason == ""
    jobs = served.jobs("mixed")
    served.run_with_late_arrivals(jobs)
    assert max(served.errors(jobs)) <= served.case.tolerance
    batches = [e for e in served.loop.events if isinstance(e, BatchDone)]
    assert sum(batch.samples >= 2 for batch in batches) >= 3
    assert max(batch.samples for batch in batches) >= 3


def first_timestep_for_all(case: FamilyCase, merged: dict[str, Any]) -> None:
    merged[case.timestep] = merged[case.timestep][:1].expand(len(merged[case.timestep]))


def prompts_swapped(case: FamilyCase, merged: dict[str, Any]) -> None:
    rows = merged[case.rows_in]
    merged[case.rows_in] = rows[::-1] if isinstance(rows, list) else rows.flip(0)


def spoil_batches(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any]], None]) -> None:
    """Let ``spoil`` change the arguments of each merged denoiser call."""
    collate = ArgumentSpec.collate

    def wrong(self: ArgumentSpec, calls: Any) -> dict[str, Any]:
        merged = collate(self, calls)
        spoil(merged)
        return merged

    monkeypatch.setattr(ArgumentSpec, "collate", wrong)


@pytest.mark.parametrize("spoil", [first_timestep_for_all, prompts_swapped])
def test_a_wrong_batch_is_noticed(
    served: Served,
    spoil: Callable[[FamilyCase, dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_batches(monkeypatch, partial(spoil, served.case))
    jobs = served.jobs(spoil.__name__)
    served.run_with_late_arrivals(jobs)
    assert max(served.errors(jobs)) > NOTICEABLE


def test_exact_images_have_the_pipelines_bytes(served: Served) -> None:
    jobs = served.jobs("exact", exact=True)
    served.loop.run(*jobs, *served.jobs("crowd"))
    for job in jobs:
        _, wanted = served.alone.image(job)
        data = served.loop.image(job.id).image.data
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        assert np.array_equal(found, wanted), np.abs(found.astype(int) - wanted.astype(int)).max()


def test_the_table_of_families_says_what_the_code_does(served: Served) -> None:
    model = cast("SuspendedModel", served.loop.models["tiny"])
    found = cells(model.info, model.runs.spec, family_of(served.alone.pipeline).size)
    check_row(served.case.name, found)


def test_different_prompts_give_different_images(served: Served) -> None:
    """A model that ignores its prompt would pass every comparison of prompts."""
    first, second = served.jobs("prompts")[:2]
    other, _ = served.alone.image(replace(first, prompt=second.prompt))
    own, _ = served.alone.image(first)
    assert float((other - own).abs().max() / own.abs().max()) > NOTICEABLE


def test_previews_are_of_the_latents_that_the_vae_decodes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served.loop.models["tiny"]
    if "preview" not in model.info.optional_fields:
        assert model.previewer is None
        return
    (job,) = served.jobs("preview", preview_every=1)[:1]
    served.loop.run(job)
    shown = [e for e in served.loop.events if isinstance(e, PreviewReady) and e.job_id == job.id]
    assert shown
    scheduler = type(served.alone.pipeline.scheduler)
    step, stepped = scheduler.step, []

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        stepped.append(found[0])
        return found

    monkeypatch.setattr(scheduler, "step", keep)
    decoded, _ = served.alone.generate(job)
    config = served.alone.pipeline.vae.config
    wanted = (decoded - (config.get("shift_factor") or 0.0)) * config.get("scaling_factor", 1.0)
    if wanted.ndim == 5:  # A video of one frame.
        wanted = wanted[:, :, 0]
    found = cast("SuspendedModel", model).runs.vae_latents(stepped[-1], job)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_each_scheduler_on_offer_repeats_an_image_by_its_seed(served: Served) -> None:
    first, *_ = served.jobs("schedulers")
    offers = served.loop.models["tiny"].info.schedulers
    runs = [
        [replace(first, id=f"{o.name}-{i}", scheduler=o.name, steps=4) for o in offers]
        for i in range(2)
    ]
    for jobs in runs:
        ends = served.loop.run(*jobs)
        assert all(isinstance(ends[job.id], JobFinished) for job in jobs), ends
    for pair in zip(*runs, strict=True):
        one, other = (served.loop.latents[job.id, 0] for job in pair)
        # They share batches, so the last bits may differ.
        assert float((one - other).abs().max() / one.abs().max()) < NOTICEABLE, pair


def test_prompts_of_different_lengths_share_batches_if_they_are_padded_with_a_mask(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, alone = ArgumentSpec.collate, ArgumentSpec.alone
    seen: list[set[int]] = []

    def lengths(call: Any) -> set[int]:
        return {len(row) for row in call[served.case.rows_in]}

    def keep_merged(self: ArgumentSpec, calls: Any) -> dict[str, Any]:
        seen.append(set[int]().union(*map(lengths, calls)))
        return collate(self, calls)

    def keep_alone(self: ArgumentSpec, call: Any) -> dict[str, Any]:
        seen.append(lengths(call))
        return alone(self, call)

    monkeypatch.setattr(ArgumentSpec, "collate", keep_merged)
    monkeypatch.setattr(ArgumentSpec, "alone", keep_alone)
    served.run_with_late_arrivals(served.jobs("lengths"))
    if served.case.mixes_lengths is None:
        assert len(set[int]().union(*seen)) == 1
        return
    assert len(set[int]().union(*seen)) > 1
    assert any(len(each) > 1 for each in seen) is served.case.mixes_lengths


def test_cached_embeddings_are_not_written_into(served: Served) -> None:
    memo = cast("SuspendedModel", served.loop.models["tiny"]).runs.host.memo

    def cached() -> dict[Any, list[torch.Tensor]]:
        tensors: dict[Any, list[torch.Tensor]] = {}
        for key, (encoded, _) in memo._found.items():
            tensors[key] = [tensor.clone() for tensor in encode_memo._tensors(encoded)]
        return tensors

    served.loop.run(*served.jobs("first", steps=2))
    before = cached()
    served.loop.run(*served.jobs("again", steps=3))
    after = cached()
    assert before.keys() == after.keys()
    assert sum(map(len, before.values())) >= len(before) > 1
    for key, tensors in before.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, after[key], strict=True))
