"""A checkpoint in one file, in the original layout, is the same model as its folder."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import LoopUnderTest, config_for, make_job
from .folders import edit_index, edited, truncate
from .original_layout import original_layout


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
    assert "check the file" in line_of(file, tiny_folder)


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
