"""IP-Adapter: rows with and without an image share batches, and equal diffusers' pipelines."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.tiny_families import flux, stable_diffusion_xl
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.engine_config import AdapterSource, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import Job, SchedulerName, Task
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.loading.ip_adapter import find_ip_adapter
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import FEW_ROWS, LoopUnderTest, config_for, make_job
from .families.image_tasks import STABLE_DIFFUSION, image_call, picture
from .ip_adapter_files import write_image_encoder, write_ip_adapter
from .test_family_parity import NOTICEABLE, spoil_batches
from .test_image_tasks import Alone

FIELDS: tuple[dict[str, Any], ...] = (
    {"ip_adapter_image": picture(1), "ip_adapter_scale": 0.6},
    {},
    {"ip_adapter_image": picture(2, size=128), "ip_adapter_scale": 1.0},
    {"ip_adapter_image": picture(3), "ip_adapter_scale": 0.3, "guidance_scale": 1.0},
    {"ip_adapter_image": picture(4), "image": picture(5), "strength": 0.8, "steps": 9},
)
"""Those of the five jobs of a case."""


def ip_adapter_call(call: Callable[[Job], Mapping[str, Any]], job: Job) -> dict[str, Any]:
    arguments = image_call(call, job)
    if job.ip_adapter_image is not None:
        size = (job.ip_adapter_image.width, job.ip_adapter_image.height)
        image = Image.frombytes("RGB", size, job.ip_adapter_image.pixels)
        arguments["ip_adapter_image"] = image
    return arguments


def with_ip_adapter(case: FamilyCase) -> FamilyCase:
    jobs = [{**job, **fields} for job, fields in zip(case.jobs, FIELDS, strict=True)]
    return replace(case, jobs=jobs, call=partial(ip_adapter_call, case.call))


CASES = [with_ip_adapter(STABLE_DIFFUSION), with_ip_adapter(stable_diffusion_xl.CASES[0])]


def source_of(folder: Path, file: Path) -> ModelSource:
    """The model in ``folder`` with the IP-Adapter ``file``."""
    adapter = AdapterSource(id="tiny", location=str(file))
    return ModelSource(id="tiny", location=str(folder), ip_adapter=adapter)


class ServedWithIpAdapter:
    """A model with an IP-Adapter, and diffusers' pipelines with it and without."""

    def __init__(self, case: FamilyCase, folder: Path, file: Path) -> None:
        self.case = case
        self.folder = folder
        self._wanted: dict[Job, tuple[torch.Tensor, Any]] = {}
        self.plain, self.alone = Alone(case, folder), Alone(case, folder)
        text = self.alone.pipelines[Task.TEXT_TO_IMAGE]
        plus = "XL" in type(text).__name__
        write_ip_adapter(file, text.unet, plus=plus)
        write_image_encoder(file.parent / "image_encoder")
        text.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
        text.unet.requires_grad_(False)
        for pipeline in self.alone.pipelines.values():
            pipeline.register_modules(
                image_encoder=text.image_encoder, feature_extractor=text.feature_extractor
            )
        sources = (source_of(folder, file),)
        self.loop = LoopUnderTest(config_for(folder, models=sources, rows=FEW_ROWS))
        self.model: Any = self.loop.models["tiny"]

    def jobs(self, name: str, **fields: Any) -> list[Job]:
        """The case's jobs, with ids that start with ``name``."""
        usual = {"width": 64, "height": 64, "scheduler": SchedulerName.MODEL}
        return [
            make_job(f"{name}-{i}", **{**usual, **each, **fields})
            for i, each in enumerate(self.case.jobs)
        ]

    def wanted(self, job: Job) -> tuple[torch.Tensor, Any]:
        """diffusers' latents and pixels of ``job``, alone."""
        key = replace(job, id="", submitted_at=0.0, exact=False)
        if key not in self._wanted:
            alone = self.plain if job.ip_adapter_image is None else self.alone
            if alone is self.alone:
                text = self.alone.pipelines[Task.TEXT_TO_IMAGE]
                text.set_ip_adapter_scale(job.ip_adapter_scale)
            self._wanted[key] = alone.image(job)
        return self._wanted[key]

    def error(self, job: Job, of: Job | None = None) -> float:
        """How far ``job``'s latents are from the pipeline's, relative to the largest value."""
        wanted, _ = self.wanted(of or job)
        found = self.loop.latents[job.id, 0]
        if self.case is CASES[0] and job.image is job.ip_adapter_image is None:
            # The latents of the engine's own loop are not yet scaled for the VAE.
            pipeline = self.plain.pipelines[Task.TEXT_TO_IMAGE]
            found = found / pipeline.vae.config.scaling_factor
        return float((found - wanted).abs().max() / wanted.abs().max())

    def run(self, jobs: list[Job]) -> None:
        """Run ``jobs`` to their end."""
        ends = self.loop.run(*jobs)
        assert all(isinstance(end, JobFinished) for end in ends.values()), ends


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedWithIpAdapter]:
    torch.set_num_threads(1)
    case: FamilyCase = request.param
    file = tmp_path_factory.mktemp("adapter") / "models" / "ip-adapter.safetensors"
    made = ServedWithIpAdapter(case, case.write(tmp_path_factory.mktemp("family")), file)
    yield made
    made.loop.close()


def test_the_model_takes_the_fields(served: ServedWithIpAdapter) -> None:
    assert {"ip_adapter_image", "ip_adapter_scale"} <= served.model.info.optional_fields


def test_rows_with_and_without_an_image_share_batches_and_equal_the_pipelines(
    served: ServedWithIpAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[bool]] = []
    denoise = type(served.model).denoise

    def keep(self: Any, samples: Any) -> Any:
        batches.append([sample.job.ip_adapter_image is None for sample in samples])
        return denoise(self, samples)

    monkeypatch.setattr(type(served.model), "denoise", keep)
    jobs = served.jobs("mixed")
    served.run(jobs)
    assert max(map(served.error, jobs)) <= served.case.tolerance
    assert max(len(batch) for batch in batches if set(batch) == {True, False}) >= 4


def test_one_scale_for_all_rows_is_noticed(
    served: ServedWithIpAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = IpAdapter.rows

    def first_for_all(self: IpAdapter, jobs: Any) -> Any:
        return rows(self, [(jobs[0][0], sum(rows for _, rows in jobs))])

    monkeypatch.setattr(IpAdapter, "rows", first_for_all)
    jobs = served.jobs("one-scale")
    served.run(jobs)
    assert max(map(served.error, jobs)) > NOTICEABLE


def test_the_image_of_another_row_is_noticed(
    served: ServedWithIpAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images_swapped(merged: dict[str, Any]) -> None:
        kwargs = merged["added_cond_kwargs"]
        kwargs["image_embeds"] = [each.flip(0) for each in kwargs["image_embeds"]]

    spoil_batches(monkeypatch, images_swapped)
    jobs = served.jobs("swapped")
    served.run(jobs)
    assert max(map(served.error, jobs)) > NOTICEABLE


def test_exact_images_have_the_pipelines_bytes(served: ServedWithIpAdapter) -> None:
    jobs = served.jobs("exact", exact=True)
    served.run([*jobs, *served.jobs("crowd")])
    for job in jobs:
        _, wanted = served.wanted(job)
        data = served.loop.image(job.id).image.data
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        assert np.array_equal(found, wanted), np.abs(found.astype(int) - wanted.astype(int)).max()
    assert served.error(jobs[0], of=replace(jobs[0], ip_adapter_image=picture(9))) > NOTICEABLE
    assert served.error(jobs[0], of=replace(jobs[0], ip_adapter_scale=0.9)) > NOTICEABLE


def test_images_without_an_image_prompt_are_bitwise_those_of_a_model_without_adapter(
    served: ServedWithIpAdapter,
) -> None:
    job = replace(served.jobs("none")[1], image_count=2)
    zero = replace(job, id="zero", ip_adapter_image=picture(1), ip_adapter_scale=0.0, exact=True)
    served.run([job])
    served.run([zero])
    plain = LoopUnderTest(config_for(served.folder, rows=FEW_ROWS))
    try:
        assert not plain.models["tiny"].info.optional_fields & {"ip_adapter_image"}
        assert isinstance(plain.run(job)[job.id], JobFinished)
        assert isinstance(plain.run(replace(job, id="alone", exact=True))["alone"], JobFinished)
    finally:
        plain.close()
    for index in range(2):
        assert torch.equal(plain.latents[job.id, index], served.loop.latents[job.id, index])
        wanted = plain.latents["alone", index]
        if served.case is CASES[0]:
            wanted = wanted / served.plain.pipelines[Task.TEXT_TO_IMAGE].vae.config.scaling_factor
        assert torch.equal(wanted, served.loop.latents["zero", index])


def test_an_image_is_encoded_once_for_a_job_and_its_repetitions(
    served: ServedWithIpAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = IpAdapter._encode

    def keep(self: IpAdapter, image: Any, *, guided: bool) -> Any:
        encoded.append(image)
        return encode(self, image, guided=guided)

    monkeypatch.setattr(IpAdapter, "_encode", keep)
    job = replace(served.jobs("once")[0], ip_adapter_image=picture(8), image_count=3)
    served.run([job, replace(job, id="again")])
    assert len(encoded) == 1


def load(folder: Path, file: Path) -> Any:
    files = find_model(source_of(folder, file), safety_checker=False)
    return load_pipeline(files, torch.float32)


@pytest.fixture(scope="module")
def adapter_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IP-Adapter of the tiny Stable Diffusion, without an image encoder."""
    source = ModelSource(id="tiny", location=str(tiny_folder))
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.float32)
    file = tmp_path_factory.mktemp("adapter") / "sdxl_models" / "ip-adapter.safetensors"
    return write_ip_adapter(file, pipeline.unet)


def test_the_image_encoder_is_the_one_whose_width_fits(adapter_file: Path) -> None:
    folder = adapter_file.parents[1]
    source = AdapterSource(id="tiny", location=str(adapter_file))
    with pytest.raises(StartupError, match="no image encoder with a projection_dim of 24 in"):
        find_ip_adapter(source)
    write_image_encoder(adapter_file.parent / "image_encoder", projection=40)
    fits = write_image_encoder(folder / "models" / "image_encoder")
    assert find_ip_adapter(source).encoder == fits
    (fits / "model.safetensors").rename(fits / "pytorch_model.bin")
    with pytest.raises(StartupError, match="pickle files only"):
        find_ip_adapter(source)


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (stable_diffusion_xl.CASES[0].write, "cannot be loaded"),
        (flux.write_dev, "a FluxPipeline takes none"),
    ],
)
def test_an_adapter_of_another_architecture(
    adapter_file: Path, tmp_path: Path, write: Callable[[Path], Path], why: str
) -> None:
    file = tmp_path / "models" / "ip-adapter.safetensors"
    file.parent.mkdir()
    save_file(load_file(adapter_file), file)
    write_image_encoder(file.parent / "image_encoder")
    with pytest.raises(StartupError, match=why) as caught:
        load(write(tmp_path / "model"), file)
    assert "\n" not in str(caught.value)


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (drop("image_proj.proj.weight"), "a kind that is supported"),
        (
            lambda weights: weights.update(
                {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(2, 2)}
            ),
            "a kind that is supported",
        ),
        (drop("ip_adapter.3.to_k_ip.weight"), "cannot be loaded"),
        (drop("image_proj.norm.weight"), "cannot be loaded"),
    ],
    ids=["no projection", "face id", "a layer missing", "a weight missing"],
)
def test_weights_that_are_not_an_ip_adapter_s(
    adapter_file: Path,
    tiny_folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    why: str,
) -> None:
    weights = load_file(adapter_file)
    change(weights)
    file = tmp_path / "ip-adapter.safetensors"
    save_file(weights, file)
    write_image_encoder(tmp_path / "image_encoder")
    with pytest.raises(StartupError, match=why):
        load(tiny_folder, file)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "ip-adapter.bin"
    file.touch()
    with pytest.raises(StartupError, match=r"not a \.safetensors file"):
        find_ip_adapter(AdapterSource(id="tiny", location=str(file)))
