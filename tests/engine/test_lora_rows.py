"""Rows with different LoRA adapters share batches, and equal diffusers' ``set_adapters`` alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from bench.tiny_families.case import FamilyCase, guided_call, mixed_jobs
from bench.tiny_families.flux import CASES as FLUX
from bench.tiny_families.qwen_image import CASES as QWEN_IMAGE
from bench.tiny_families.stable_diffusion_3 import CASES as STABLE_DIFFUSION_3
from bench.tiny_families.stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL
from bench.tiny_families.z_image import CASES as Z_IMAGE
from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.events import BatchDone, JobFinished
from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters import layers, module
from darkroom_server.engine.adapters.plan import Plan

from .adapter_files import write_adapter
from .test_family_parity import NOTICEABLE, Served
from .tiny import write_tiny_model

pytest.importorskip("peft")

# PEFT warns of the second adapter, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

STABLE_DIFFUSION = FamilyCase(
    "Stable Diffusion",
    write_tiny_model,
    mixed_jobs({}, {}, {"guidance_scale": 1.0}, {}, {}),
    lambda job: {n: v for n, v in guided_call(job).items() if n != "max_sequence_length"},
    load={"safety_checker": None},
)

CASES = [
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL[0],
    STABLE_DIFFUSION_3[0],
    FLUX[0],
    QWEN_IMAGE[0],
    Z_IMAGE[0],
]

A, B = Lora(id="a"), Lora(id="b", scale=0.5)
MIXES = ((A,), (), (B,), (Lora(id="a", scale=0.7), Lora(id="b", scale=0.3)), (A,))
"""The adapters of the five jobs of a case."""


class ServedWithAdapters(Served):
    """A model with two adapters, and diffusers' pipeline that has loaded them too."""

    def __init__(self, case: FamilyCase, folder: Path, adapters: Path) -> None:
        self.adapters = adapters
        sources = [
            AdapterSource(id=id, location=str(adapters / f"{id}.safetensors")) for id in "ab"
        ]
        probe = diffusers.DiffusionPipeline.from_pretrained(folder, **case.load)
        write_adapter(adapters / "a.safetensors", probe, rank=4, seed=1)
        write_adapter(adapters / "b.safetensors", probe, rank=8, seed=2)
        for id in "ab":
            probe.load_lora_weights(adapters / f"{id}.safetensors", adapter_name=id)
        super().__init__(case, folder, adapters=tuple(sources))
        for id in "ab":
            self.alone.pipeline.load_lora_weights(adapters / f"{id}.safetensors", adapter_name=id)

    def image(self, job: Job) -> tuple[torch.Tensor, Any]:
        """diffusers' own latents and pixels, alone, with the adapters of ``job``."""
        pipeline = self.alone.pipeline
        if job.loras:
            pipeline.enable_lora()
            pipeline.set_adapters([x.id for x in job.loras], [x.scale for x in job.loras])
        else:
            pipeline.disable_lora()
        latents, pixels = self.alone.image(job)
        if self.case.name == "Stable Diffusion":
            # The hand-written loop's latents have the scale of what the scheduler steps.
            latents = latents * pipeline.vae.config.scaling_factor
        return latents, pixels

    def mixed(self, name: str, **fields: Any) -> list[Job]:
        """The case's jobs, with different adapters."""
        return [
            replace(job, loras=mix)
            for job, mix in zip(self.jobs(name, **fields), MIXES, strict=True)
        ]

    def errors(self, jobs: list[Job]) -> list[float]:
        """How far each job's latents are from the pipeline's, relative to the largest value."""
        errors = []
        for job in jobs:
            wanted, _ = self.image(job)
            found = self.loop.latents[job.id, 0]
            errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
        return errors

    def batches(self, first: int = 0) -> list[BatchDone]:
        """The batches since event ``first``."""
        return [e for e in self.loop.events[first:] if isinstance(e, BatchDone)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedWithAdapters]:
    torch.set_num_threads(1)
    case: FamilyCase = request.param
    folder = tmp_path_factory.mktemp("family")
    made = ServedWithAdapters(case, case.write(folder), tmp_path_factory.mktemp("adapters"))
    yield made
    made.loop.close()


@pytest.mark.parametrize("masked_rank", [64, 0])
@pytest.mark.parametrize("gathered_bytes", [2**28, 0])
def test_mixed_rows_equal_set_adapters_alone(
    served: ServedWithAdapters,
    masked_rank: int,
    gathered_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "MASKED_RANK", masked_rank)
    monkeypatch.setattr(module, "GATHERED_BYTES", gathered_bytes)
    name = f"mixed-{masked_rank}-{gathered_bytes}"
    first = len(served.loop.events)
    jobs = served.mixed(name)
    served.run_with_late_arrivals(jobs)
    assert max(served.errors(jobs)) <= served.case.tolerance
    batches = served.batches(first)
    assert sum(batch.samples >= 2 for batch in batches) >= 3
    assert max(batch.samples for batch in batches) >= 3
    assert max(batch.adapters for batch in batches) == 2


def no_adapters(mixes: Any) -> Any:
    return [()] * len(mixes)


def swapped_adapters(mixes: Any) -> Any:
    other = {"a": "b", "b": "a"}
    return [tuple((other[id], scale) for id, scale in mix) for mix in mixes]


def rows_reversed(mixes: Any) -> Any:
    return mixes[::-1]


def scales_ignored(mixes: Any) -> Any:
    return [tuple((id, 1.0) for id, _ in mix) for mix in mixes]


@pytest.mark.parametrize("spoil", [no_adapters, swapped_adapters, rows_reversed, scales_ignored])
def test_wrong_rows_are_noticed(
    served: ServedWithAdapters, spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = module.AdaptedModule._plan

    def wrong(self: Any, mixes: Any, weights: Any) -> Plan:
        return plan(self, spoil(mixes) if len(mixes) > 1 else mixes, weights)

    monkeypatch.setattr(module.AdaptedModule, "_plan", wrong)
    jobs = served.mixed(spoil.__name__)
    served.run_with_late_arrivals(jobs)
    assert max(served.errors(jobs)) > NOTICEABLE


def test_exact_images_do_not_depend_on_their_company(served: ServedWithAdapters) -> None:
    pixels = []
    for company in ("first", "second"):
        jobs = served.mixed(f"exact-{company}", exact=True)
        crowd = served.mixed(f"crowd-{company}") if company == "second" else []
        ends = served.loop.run(*jobs, *crowd)
        assert all(isinstance(end, JobFinished) for end in ends.values())
        pixels.append([served.loop.image(job.id).image.data for job in jobs])
    assert pixels[0] == pixels[1]
    for job, data in zip(jobs, pixels[1], strict=True):
        _, wanted = served.image(job)
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_rows_without_adapters_are_bitwise_those_of_a_model_without(
    served: ServedWithAdapters, tmp_path: Path
) -> None:
    """Alone: a merged batch differs in the last bits from the pipeline in any case."""
    job = replace(served.jobs("none")[0], exact=True)
    served.loop.run(*served.mixed("before"))
    served.loop.run(job)
    plain = Served(served.case, served.case.write(tmp_path))
    try:
        plain.loop.run(job)
        assert torch.equal(plain.loop.latents[job.id, 0], served.loop.latents[job.id, 0])
    finally:
        plain.loop.close()


def test_each_adapter_changes_the_image(served: ServedWithAdapters) -> None:
    jobs = served.mixed("effect")
    plain, _ = served.image(replace(jobs[0], loras=()))
    for loras in MIXES:
        if loras:
            other, _ = served.image(replace(jobs[0], loras=loras))
            assert float((other - plain).abs().max() / plain.abs().max()) > NOTICEABLE
