"""Defaults of a model's unset request fields: its folder's ``darkroom.json``, or its family's."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.loading.defaults import Defaults, read_defaults

from .conftest import LoopUnderTest, config_for

FAMILY = Defaults(steps=12, guidance_scale=3.5)


def read(folder: Path) -> Defaults:
    return read_defaults(ModelSource(id="m", location=str(folder)), FAMILY)


def test_a_folder_without_the_file_has_the_family_s(tmp_path: Path) -> None:
    assert read(tmp_path) == FAMILY
    assert read(tmp_path / "owner" / "on-the-hub") == FAMILY


def test_stable_diffusion_s_own() -> None:
    assert StableDiffusion.defaults == Defaults(steps=30, guidance_scale=7.5)


def test_a_folder_may_set_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "darkroom.json").write_text(json.dumps({"guidance_scale": 1}))
    assert read(tmp_path) == Defaults(steps=12, guidance_scale=1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "may hold steps, guidance_scale, true_cfg_scale, size, and nothing else"),
        (
            '{"sampler": "ddim"}',
            "may hold steps, guidance_scale, true_cfg_scale, size, and nothing else",
        ),
        ('{"steps": 0}', "steps in its darkroom.json must be 1 to 150"),
        ('{"steps": true}', "steps in its darkroom.json must be 1 to 150"),
        ('{"guidance_scale": "high"}', "guidance_scale in its darkroom.json must be 0 to 50"),
        ('{"true_cfg_scale": 51}', "true_cfg_scale in its darkroom.json must be 0 to 50"),
        ('{"size": 64.0}', "size in its darkroom.json must be 8 to 8192"),
        ('{"guidance_scale": NaN}', "guidance_scale in its darkroom.json must be 0 to 50"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "darkroom.json").write_text(text)
    with pytest.raises(StartupError, match=complaint):
        read(tmp_path)


def test_a_folder_may_set_the_size(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "darkroom.json").write_text('{"size": 96}')
    loop = LoopUnderTest(config_for(folder))
    try:
        info = loop.models["tiny"].info
        assert (info.defaults.width, info.defaults.height) == (96, 96)
        assert (info.limits.min_size, info.limits.max_size) == (64, 192)
        assert info.memory.pixels == 96 * 96
    finally:
        loop.close()


def test_a_size_that_the_model_cannot_have_is_one_clear_line(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "darkroom.json").write_text('{"size": 100}')
    with pytest.raises(StartupError, match="must be a multiple of 8"):
        LoopUnderTest(config_for(folder))


def test_the_demo_model_asks_for_what_its_card_recommends() -> None:
    folder = Path(str(files("darkroom_server") / "demo_model"))
    card = (folder / "README.md").read_text("utf-8")
    assert "* Recommended: 20 steps, guidance scale 2.0," in card
    assert read(folder) == Defaults(steps=20, guidance_scale=2.0)
