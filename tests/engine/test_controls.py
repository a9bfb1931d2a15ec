"""Rows with different ControlNets, and without, share batches and equal diffusers' own images."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.engine_config import ControlNetSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import AdapterLoaded, BatchDone, JobFinished
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.conditioning.input_images import pil_image
from darkroom_server.engine.controls import model_controls
from darkroom_server.engine.controls.model_controls import ModelControls
from darkroom_server.engine.controls.sample_control import SampleControl
from darkroom_server.engine.families.stable_diffusion import StableDiffusionModel
from darkroom_server.engine.families.unet import UNET_CONTROLS

from .conftest import FEW_ROWS, LoopUnderTest, config_for, make_job
from .families.controls import CASES, ControlCase
from .test_family_parity import NOTICEABLE


class Alone:
    """diffusers' pipelines on a folder, with the nets of each job, called as their users do."""

    def __init__(self, case: ControlCase, folder: Path, nets: Path) -> None:
        self._case = case
        self.text = diffusers.DiffusionPipeline.from_pretrained(folder, **case.family.load)
        for part in self.text.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        denoiser = getattr(self.text, "unet", None) or self.text.transformer
        self.folders = case.write_nets(nets, denoiser)
        self._nets = {
            id: type(make(denoiser)).from_pretrained(self.folders[id]).requires_grad_(False)
            for id, make in case.nets.items()
        }
        self._scheduler = copy.deepcopy(self.text.scheduler)
        self._latents: list[torch.Tensor] = []
        self._known: dict[Job, tuple[torch.Tensor, NDArray[np.uint8]]] = {}
        decode = self.text.vae.decode

        def keep(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._latents.append(z)
            return decode(z, *args, **kwargs)

        self.text.vae.decode = keep

    def image(self, job: Job) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """What the VAE decodes for the image of ``job``, and the pixels."""
        key = replace(job, id="", exact=False, submitted_at=0.0)
        if key not in self._known:
            self._known[key] = self._image(job)
        return self._known[key]

    def _image(self, job: Job) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        pipeline, arguments = self.text, dict(self._case.family.call(job))
        if job.image is not None:
            arguments |= {"image": pil_image(job.image), "strength": job.strength}
        if job.mask_image is not None:
            arguments["mask_image"] = pil_image(job.mask_image)
        if job.controls:
            nets = [self._nets[control.id] for control in job.controls]
            pictures = [pil_image(control.image) for control in job.controls]
            # Without a dtype, from_pipe would convert the weights to float32.
            name, argument = self._case.pipelines[job.task]
            pipeline = getattr(diffusers, name).from_pipe(
                self.text,
                controlnet=nets if len(nets) > 1 else nets[0],
                torch_dtype=None,
            )
            starts = [control.start for control in job.controls]
            ends = [control.end for control in job.controls]
            scales = [control.scale for control in job.controls]
            arguments |= {
                "controlnet_conditioning_scale": scales if len(nets) > 1 else scales[0],
                "control_guidance_start": starts if len(nets) > 1 else starts[0],
                "control_guidance_end": ends if len(nets) > 1 else ends[0],
            }
            arguments[argument] = pictures if len(nets) > 1 else pictures[0]
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = copy.deepcopy(self._scheduler)
        taken = inspect.signature(pipeline.__call__).parameters
        size = {"width": job.width, "height": job.height}
        torch.manual_seed(job.seed)
        image = pipeline(
            num_inference_steps=job.steps,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            output_type="pil",
            **{name: value for name, value in size.items() if name in taken},
            **arguments,
        ).images[0]
        return self._latents.pop(), np.asarray(image)


class Served:
    """The model of a case in a loop, with its nets."""

    def __init__(self, case: ControlCase, folder: Path, nets: Path) -> None:
        self.case = case
        self.alone = Alone(case, folder, nets)
        sources = tuple(
            ControlNetSource(id=id, location=str(each)) for id, each in self.alone.folders.items()
        )
        self.loop = LoopUnderTest(config_for(folder, controlnets=sources, rows=FEW_ROWS))

    @property
    def info(self) -> Any:
        """The served model."""
        return self.loop.models["tiny"].info

    @property
    def controls(self) -> ModelControls:
        """The nets of the served model."""
        model: Any = self.loop.models["tiny"]
        found = model.controls if isinstance(model, StableDiffusionModel) else model.runs.controls
        assert isinstance(found, ModelControls)
        return found

    def jobs(self, name: str, **fields: Any) -> list[Job]:
        """The case's jobs, with ids that start with ``name``."""
        usual = {"width": 64, "height": 64, "scheduler": SchedulerName.MODEL}
        return [
            make_job(f"{name}-{i}", **{**usual, **each, **fields})
            for i, each in enumerate(self.case.family.jobs)
        ]

    def run(self, jobs: list[Job]) -> None:
        """Run ``jobs`` to their end."""
        ends = self.loop.run(*jobs)
        for job in jobs:
            assert isinstance(ends[job.id], JobFinished), ends[job.id]

    def error(self, job: Job, of: Job | None = None) -> float:
        """How far ``job``'s latents are from the pipeline's, relative to the largest value."""
        wanted, _ = self.alone.image(of or job)
        found = self.loop.latents[job.id, 0]
        model: Any = self.loop.models["tiny"]
        if isinstance(model, StableDiffusionModel) and job.image is None:
            # The latents of the engine's own loop are not yet scaled for the VAE.
            found = found / self.alone.text.vae.config.scaling_factor
        return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    torch.set_num_threads(1)
    case: ControlCase = request.param
    folder = case.family.write(tmp_path_factory.mktemp("family"))
    made = Served(case, folder, tmp_path_factory.mktemp("nets"))
    yield made
    made.loop.close()


Additions = list[tuple[list[set[str]], Any, Any, list[int]]]


@pytest.fixture
def additions(monkeypatch: pytest.MonkeyPatch) -> Additions:
    """Of each batch: the nets of each sample now, the arguments before and after, and the rows."""
    kept: Additions = []
    add = ModelControls.add

    def keep(self: ModelControls, given: Any, samples: Any) -> Any:
        found = add(self, given, samples)
        nets = [
            {each.id for each in sample.controls if each.applies(sample.step, sample.steps)}
            for sample in samples
        ]
        kept.append((nets, given, found, [sample.rows for sample in samples]))
        return found

    monkeypatch.setattr(ModelControls, "add", keep)
    return kept


def test_the_model_offers_its_nets(served: Served) -> None:
    info = served.info
    assert "controls" in info.optional_fields
    assert info.limits.max_controls == 4
    offers = {offer.id: offer for offer in info.adapters}
    assert offers.keys() == served.case.nets.keys()
    for id, offer in offers.items():
        assert offer.kind is AdapterKind.CONTROLNET
        assert offer.bytes == sum(4 * w.numel() for w in served.controls.nets[id].parameters())
        assert 0.0 < offer.cost <= 1.0
    assert info.memory.control_bytes_per_row > 0
    loaded = {event.adapter for event in served.loop.events if isinstance(event, AdapterLoaded)}
    assert loaded == set(served.case.nets)


def test_mixed_rows_equal_the_pipelines_alone(served: Served, additions: Additions) -> None:
    first = len(served.loop.events)
    jobs = served.jobs("mixed")
    served.run(jobs)
    assert max(map(served.error, jobs)) <= served.case.family.tolerance
    both_and_none = [
        nets for nets, *_ in additions if set() in nets and {"a", "b"} <= set().union(*nets)
    ]
    assert max(map(len, both_and_none), default=0) >= 3
    assert any({"a", "b"} in nets and len(nets) > 1 for nets, *_ in additions)
    batches = [event for event in served.loop.events[first:] if isinstance(event, BatchDone)]
    assert any(batch.control_cost > 0 for batch in batches)


def test_zero_residuals_are_bitwise_none(served: Served, additions: Additions) -> None:
    served.run(served.jobs("zeros"))
    nets, before, after, rows = next(
        each for each in additions if set() in each[0] and any(each[0])
    )
    with torch.inference_mode():
        denoiser = served.controls.denoiser
        without, added = denoiser(**before)[0], denoiser(**after)[0]
    for ids, none, some in zip(nets, without.split(rows), added.split(rows), strict=True):
        assert torch.equal(none, some) is not bool(ids)


def images_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = ModelControls.condition

    def other(self: ModelControls, id: str, image: Any, rows: int, generator: Any) -> Any:
        return condition(self, id, replace(image, pixels=image.pixels[::-1]), rows, generator)

    monkeypatch.setattr(ModelControls, "condition", other)


def one_scale_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    add_scaled = model_controls._add_scaled

    def wrong(into: Any, parts: Any, users: Any) -> None:
        scale = users[0].control.scale
        same = [replace(use, control=replace(use.control, scale=scale)) for use in users]
        add_scaled(into, parts, same)

    monkeypatch.setattr(model_controls, "_add_scaled", wrong)


def rows_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    add_scaled = model_controls._add_scaled

    def wrong(into: Any, parts: Any, users: Any) -> None:
        add_scaled(into, [part.flip(0) for part in parts], users)

    monkeypatch.setattr(model_controls, "_add_scaled", wrong)


def nets_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = ModelControls.residuals
    other = {"a": "b", "b": "a"}

    def wrong(self: ModelControls, id: str, given: Any, users: Any) -> Any:
        return residuals(self, other.get(id, id), given, users)

    monkeypatch.setattr(ModelControls, "residuals", wrong)


def start_and_end_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleControl, "applies", lambda self, step, steps: True)


@pytest.mark.parametrize(
    "spoil", [images_swapped, one_scale_for_all, rows_reversed, nets_swapped, start_and_end_ignored]
)
def test_a_wrong_batch_is_noticed(
    served: Served,
    spoil: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    jobs = served.jobs(spoil.__name__)
    served.run(jobs)
    assert max(map(served.error, jobs)) > NOTICEABLE


def test_exact_images_have_the_pipelines_bytes(served: Served) -> None:
    jobs = served.jobs("exact", exact=True)
    served.run([*jobs, *served.jobs("crowd")])
    for job in jobs:
        if not job.controls:
            continue
        _, wanted = served.alone.image(job)
        data = served.loop.image(job.id).image.data
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        assert np.array_equal(found, wanted), np.abs(found.astype(int) - wanted.astype(int)).max()


def test_a_scale_of_zero_and_a_schedule_of_no_step_change_nothing(served: Served) -> None:
    job = served.jobs("nothing")[0]
    (control,) = job.controls
    none = replace(control, scale=0.0)
    # No step is whole between a half and 0.55 of 5 steps.
    never = replace(control, start=0.5, end=0.55)
    plain = replace(job, id="plain", controls=(), exact=True)
    silent = [
        replace(job, id=f"silent-{i}", controls=(each,), exact=True)
        for i, each in enumerate((none, never))
    ]
    served.run([plain, *silent])
    # In FLUX, a control image takes noise before the image does.
    same = [each.id for each in ([*silent, plain] if served.case.keeps_noise else silent)]
    for id in same:
        assert torch.equal(served.loop.latents[id, 0], served.loop.latents[same[0], 0])


def test_what_a_sample_holds_is_what_admission_expects(served: Served) -> None:
    job = served.jobs("held")[2]
    image, generator = job.controls[0].image, torch.Generator()
    with torch.inference_mode():
        condition = served.controls.condition("a", image, 2, generator)
    more = served.info.held_bytes(job) - served.info.held_bytes(replace(job, controls=()))
    assert more >= 2 * condition.untyped_storage().nbytes()
    served.run([job])
    residency = served.loop.loop._residency
    assert residency.held_bytes == 0


class _Denoiser:
    def __init__(self, **config: Any) -> None:
        self.config = {
            "cross_attention_dim": 768,
            "block_out_channels": (320, 640),
            "layers_per_block": 2,
            "addition_embed_type": None,
            "projection_class_embeddings_input_dim": None,
            **config,
        }


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, ""),
        ({"block_out_channels": [320, 640]}, ""),
        ({"cross_attention_dim": 1024}, "its cross_attention_dim is 1024, the model's is 768"),
        ({"block_out_channels": [320]}, "its block_out_channels is"),
        ({"addition_embed_type": "text_time"}, "its addition_embed_type is text_time"),
        ({"in_channels": 9}, "its in_channels is 9, the model's latents have 4"),
        ({"conditioning_channels": 1}, "it reads images of 1 channels, not of 3"),
        ({"global_pool_conditions": True}, "it pools its condition"),
        ({"_class_name": "ControlNetUnionModel"}, "it is a ControlNetUnionModel"),
    ],
)
def test_the_configuration_of_a_net_says_why_it_does_not_fit(
    config: dict[str, Any], why: str
) -> None:
    class Config(dict[str, Any]):
        out_channels = 4

    denoiser = _Denoiser()
    denoiser.config = Config(denoiser.config)
    net = {**denoiser.config, "_class_name": "ControlNetModel", "in_channels": 4, **config}
    found = UNET_CONTROLS.mismatch(net, denoiser)
    assert found.startswith(why) if why else not found


@pytest.mark.parametrize("model", [None, "tiny"])
def test_a_net_of_another_model_stops_the_start(
    tiny_folder: Path, tmp_path: Path, model: str | None
) -> None:
    diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ).save_pretrained(tmp_path)
    source = ControlNetSource(id="other", location=str(tmp_path), model=model)
    with pytest.raises(StartupError, match="its cross_attention_dim is 24, the model's is 16"):
        LoopUnderTest(config_for(tiny_folder, controlnets=(source,)))


def test_a_folder_without_a_net_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    source = ControlNetSource(id="empty", location=str(tmp_path))
    with pytest.raises(StartupError, match="cannot be loaded"):
        LoopUnderTest(config_for(tiny_folder, controlnets=(source,)))
