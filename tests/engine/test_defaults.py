"""Defaults of a model's unset request fields: its folder's ``darkroom.json``, or its family's."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.loading.defaults import Defaults, read_defaults

from .conftest import LoopUnderTest, config_for
from .folders import edited

FAMILY = Defaults(steps=12, guidance_scale=3.5)


def write(folder: Path, content: dict[str, Any]) -> None:
    (folder / "darkroom.json").write_text(json.dumps(content))


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


def test_a_folder_may_set_the_size(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "model", lambda f: write(f, {"size": 48}))
    loop = LoopUnderTest(config_for(folder))
    loop.close()
    defaults = loop.models["tiny"].info.defaults
    assert (defaults.width, defaults.height) == (48, 48)


def test_a_size_that_the_model_cannot_have_is_one_clear_line(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_folder, tmp_path / "model", lambda f: write(f, {"size": 49}))
    with pytest.raises(StartupError, match=r"size in its darkroom\.json must be a multiple of 8"):
        LoopUnderTest(config_for(folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "may hold steps, guidance_scale, true_cfg_scale and size, and nothing else"),
        ('{"sampler": "ddim"}', "may hold steps, guidance_scale"),
        ('{"true_cfg_scale": -1}', "true_cfg_scale in its darkroom.json must be 0 to 50"),
        ('{"size": 512.0}', "size in its darkroom.json must be 16 to 8192"),
        ('{"size": 8}', "size in its darkroom.json must be 16 to 8192"),
        ('{"steps": 0}', "steps in its darkroom.json must be 1 to 150"),
        ('{"steps": true}', "steps in its darkroom.json must be 1 to 150"),
        ('{"guidance_scale": "high"}', "guidance_scale in its darkroom.json must be 0 to 50"),
        ('{"guidance_scale": NaN}', "guidance_scale in its darkroom.json must be 0 to 50"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "darkroom.json").write_text(text)
    with pytest.raises(StartupError, match=complaint):
        read(tmp_path)


def test_the_demo_model_asks_for_what_its_card_recommends() -> None:
    folder = Path(str(files("darkroom_server") / "demo_model"))
    card = (folder / "README.md").read_text("utf-8")
    assert "* Recommended: 20 steps, guidance scale 2.0," in card
    assert read(folder) == Defaults(steps=20, guidance_scale=2.0)
