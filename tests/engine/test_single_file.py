"""A checkpoint in one file, in the original layout, is the same model as its folder."""

import json
import resource
import struct
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import load_file, save_file

from bench.tiny_families.aura_flow import write_aura_flow
from bench.tiny_families.stable_diffusion_3 import write_sd3
from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.describe import Catalogue
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.families.registry import FAMILIES
from darkroom_server.engine.loading.checkpoint import KINDS, pipeline_class_of, read_shapes
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import LoopUnderTest, config_for, make_job
from .folders import edit_index, edited, truncate
from .original_layout import original_layout
from .original_layout_sd3 import original_sd3_layout


@pytest.fixture(scope="module")
def weights(tiny_folder: Path) -> dict[str, torch.Tensor]:
    return original_layout(StableDiffusionPipeline.from_pretrained(tiny_folder))


def line_of(file: Path, config: Path | None) -> str:
    source = ModelSource(id="one", location=str(file), config=str(config) if config else None)
    with pytest.raises(StartupError) as caught:
        load_pipeline(find_model(source, safety_checker=False), torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_equal_the_folders(
    weights: dict[str, torch.Tensor], tiny_folder: Path, shared_loop: LoopUnderTest, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file(weights, file)
    # Without weights, to show that none of its are read.
    config = edited(tiny_folder, tmp_path / "config", _drop_weights)
    source = ModelSource(id="tiny", location=str(file), config=str(config))
    loop = LoopUnderTest(config_for(tiny_folder, models=(source,)))
    try:
        job = make_job("single-file", exact=True)
        loop.run(job)
        shared_loop.run(job)
        assert loop.image(job.id).image.data == shared_loop.image(job.id).image.data
    finally:
        loop.close()


def _drop_weights(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage"])
def test_a_file_that_lacks_a_weight(
    part: str, weights: dict[str, torch.Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.safetensors"
    lost = next(k for k in weights if k.startswith(part) and "norm" in k and k.endswith("weight"))
    save_file({key: weight for key, weight in weights.items() if key != lost}, file)
    assert "check the file" in line_of(file, tiny_folder)


def test_a_truncated_file(
    weights: dict[str, torch.Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file(weights, file)
    truncate(file)
    assert "check the file" in line_of(file, tiny_folder)


def test_a_file_of_something_else(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    line = line_of(file, tiny_folder)
    assert "has no weights of a VAE and of a text encoder: give a file that holds" in line


def test_another_architecture(
    weights: dict[str, torch.Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file(weights, file)
    other = edited(
        tiny_folder,
        tmp_path / "other",
        lambda f: edit_index(f, _class_name="StableDiffusionXLPipeline"),
    )
    assert "has no text_encoder_2; check the file, and that" in line_of(file, other)
    assert "no such folder" in line_of(file, tmp_path / "nowhere")


def test_a_file_that_is_not_safetensors(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"a pickle")
    assert "convert it" in line_of(file, tiny_folder)


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion XL; a key of its second encoder's tenth layer names its kind."""
    return write_sdxl(tmp_path_factory.mktemp("xl"), width_2=48, layers_2=10)


@pytest.fixture(scope="module")
def xl_file(xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("xl-file") / "xl.safetensors"
    save_file(original_layout(StableDiffusionXLPipeline.from_pretrained(xl_folder)), file)
    return file


def test_a_file_of_stable_diffusion_xl_is_the_same_model_as_its_folder(
    xl_folder: Path, xl_file: Path, tmp_path: Path
) -> None:
    config = edited(xl_folder, tmp_path / "config", _drop_weights)
    assert image_of(xl_file, config) == image_of(xl_folder, None)


def test_a_file_of_stable_diffusion_3_is_the_same_model_as_its_folder(tmp_path: Path) -> None:
    folder = write_sd3(tmp_path / "sd3", width_2=16)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    file = tmp_path / "sd3.safetensors"
    save_file(original_sd3_layout(pipeline), file)
    config = edited(folder, tmp_path / "config", _drop_weights)
    assert image_of(file, config) == image_of(folder, None)


def image_of(model: Path, config: Path | None) -> bytes:
    """The image that the model in a folder or a file makes."""
    source = ModelSource(id="one", location=str(model), config=str(config) if config else None)
    loop = LoopUnderTest(config_for(model, models=(source,)))
    job = make_job("one", model="one", exact=True, scheduler=SchedulerName.MODEL)
    try:
        assert isinstance(loop.run(job)[job.id], JobFinished)
        return loop.image(job.id).image.data
    finally:
        loop.close()


@pytest.mark.parametrize("part", ["conditioner.embedders.0.", "conditioner.embedders.1.", "label"])
def test_a_file_of_stable_diffusion_xl_that_lacks_a_weight(
    part: str, xl_folder: Path, xl_file: Path, tmp_path: Path
) -> None:
    weights = load_file(xl_file)
    # The last ones: the first name the kind of file.
    lost = [key for key in weights if part in key and key.endswith(("bias", "weight"))][-1]
    file = tmp_path / "xl.safetensors"
    save_file({key: weight for key, weight in weights.items() if key != lost}, file)
    assert "check the file" in line_of(file, xl_folder)


def test_a_file_is_recognised_by_its_keys(
    xl_file: Path, tiny_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shapes = read_shapes(xl_file)
    assert pipeline_class_of(shapes, "xl") == "StableDiffusionXLPipeline"
    assert pipeline_class_of(weights, "tiny") is None
    line = line_of(xl_file, tiny_folder)
    assert "is of a StableDiffusionXLPipeline, and --model-config" in line
    assert "of a StableDiffusionPipeline; give a folder of the file's architecture" in line
    refiner = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
    with pytest.raises(StartupError, match="of kind 'xl_refiner', which is not supported"):
        pipeline_class_of({**weights, refiner: torch.zeros(3)}, "refiner")


@pytest.mark.parametrize("key", ["flux", "z-image-turbo", "sd35_large", "chroma"])
def test_a_file_that_holds_a_transformer_only(key: str, tiny_folder: Path, tmp_path: Path) -> None:
    """As most single files of these families are."""
    file = tmp_path / "transformer.safetensors"
    names = CHECKPOINT_KEY_NAMES[key]
    save_file({name: torch.zeros(3) for name in names}, file)
    line = line_of(file, tiny_folder)
    assert "has no weights of a VAE and of a text encoder" in line
    whole = {name: torch.zeros(3) for name in (*names, "vae.a", "text_encoders.b")}
    assert pipeline_class_of(whole, "whole") in FAMILIES


def test_every_kind_of_file_has_a_family_that_diffusers_reads_from_a_file() -> None:
    for kind in set(KINDS.values()):
        assert hasattr(getattr(diffusers, FAMILIES[kind].pipeline_class), "from_single_file")


def test_a_family_that_diffusers_reads_from_folders_only(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "sana.safetensors"
    save_file(weights, file)
    line = line_of(file, write_aura_flow(tmp_path / "config"))
    assert "diffusers reads no single file of a AuraFlowPipeline; give a pipeline's folder" in line


def test_a_file_is_described_from_its_keys(
    weights: dict[str, torch.Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    file, huge = tmp_path / "tiny.safetensors", tmp_path / "huge.safetensors"
    save_file(weights, file)
    _write_huge(file, huge)
    sources = [
        ModelSource(id=path.stem, location=str(path), config=str(tiny_folder))
        for path in (file, huge)
    ]
    config = config_for(tiny_folder, models=(), catalogue=tuple(sources))
    device = torch.device("cpu")
    catalogue = Catalogue(config, device, Adapters.of(config), ControlNets(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {each.id: each for each in catalogue.describe_all(sources)}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * 1024 < HUGE / 16, "its bytes were read"
    tiny, other = found["tiny"], found["huge"]
    assert tiny.info is not None
    assert other.info is not None
    assert (tiny.reason, other.reason) == ("", "")
    assert tiny.info.kind == "StableDiffusionPipeline"
    assert replace(other.info, id="tiny", memory=tiny.info.memory) == tiny.info
    assert tiny.weight_bytes < 2**23 < HUGE < other.weight_bytes


HUGE = 2**33
"""Bytes that nobody reads unnoticed."""


def _write_huge(file: Path, huge: Path) -> None:
    """Write ``file`` with one more tensor, whose bytes are a hole."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["cond_stage_model.hole"] = {
        "dtype": "U8",
        "shape": [HUGE],
        "data_offsets": [end, end + HUGE],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with huge.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        out.truncate(8 + len(text) + end + HUGE)
