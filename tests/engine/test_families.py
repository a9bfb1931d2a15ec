"""The seam of the model families: what a new one must provide, and nothing else."""

from pathlib import Path

import diffusers
import pytest
import torch

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.events import JobFinished
from darkroom_server.engine.families import registry
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import LoopUnderTest, config_for, make_job
from .folders import edit_index, edited


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_a_family_is_registered_under_a_class_of_diffusers(name: str) -> None:
    family = registry.FAMILIES[name]
    assert name == family.pipeline_class
    assert hasattr(diffusers, name)
    assert family.denoiser_name in family.components


def test_one_more_line_in_the_registry_serves_one_more_class(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panorama(StableDiffusion):
        pipeline_class = "StableDiffusionPanoramaPipeline"

    folder = edited(
        tiny_folder,
        tmp_path / "panorama",
        lambda f: edit_index(f, _class_name="StableDiffusionPanoramaPipeline"),
    )
    source = ModelSource(id="tiny", location=str(folder))
    monkeypatch.setitem(registry.FAMILIES, Panorama.pipeline_class, Panorama)
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.float32)
    assert type(pipeline) is diffusers.StableDiffusionPanoramaPipeline
    loop = LoopUnderTest(config_for(folder))
    try:
        assert loop.models["tiny"].info.kind == "StableDiffusionPanoramaPipeline"
        assert isinstance(loop.run(make_job("wide"))["wide"], JobFinished)
    finally:
        loop.close()
