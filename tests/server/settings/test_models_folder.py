"""The folder of models, and which models are loaded at start."""

import shutil
from pathlib import Path

import pytest

from darkroom_server.core.errors import StartupError
from darkroom_server.settings import Models, Settings
from darkroom_server.settings.models_folder import models_below
from darkroom_server.settings.sources import (
    all_sources,
    engine_configs,
    model_sources,
    models_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pipelines, one of them deeper, a single file, and files that are no models."""
    for name in ("owls", "sdxl/toads"):
        pipeline = tmp_path / name
        (pipeline / "unet").mkdir(parents=True)
        (pipeline / "model_index.json").write_text("{}")
        (pipeline / "unet" / "weights.safetensors").touch()
    (tmp_path / "sdxl" / "moths.v2.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "part.safetensors").touch()
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet" / "config.json").touch()
    (tmp_path / "controlnet" / "weights.safetensors").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def test_pipelines_and_files_are_found(folder: Path) -> None:
    assert dict(models_below(folder)) == {
        "owls": folder / "owls",
        "sdxl/toads": folder / "sdxl" / "toads",
        "sdxl/moths.v2": folder / "sdxl" / "moths.v2.safetensors",
    }
    assert list(models_below(folder / "owls")) == [("owls", folder / "owls")]


def test_named_models_come_first_and_win(folder: Path) -> None:
    models = Models(model=("owls=demo",), models_dir=str(folder), allow_download=True)
    sources = all_sources(models)
    assert [source.id for source in sources] == ["owls", "sdxl/moths.v2", "sdxl/toads"]
    assert sources[0] == model_sources(models)[0]
    (config,) = engine_configs(Settings(models=models), None)
    assert [source.id for source in config.models] == ["owls"]
    assert [source.id for source in config.catalogue] == ["sdxl/moths.v2", "sdxl/toads"]


def test_a_folder_takes_the_place_of_the_demo_model(folder: Path) -> None:
    (config,) = engine_configs(Settings(models=Models(models_dir=str(folder))), None)
    assert config.models == ()
    assert len(config.catalogue) == 3
    assert not any(source.may_download for source in config.catalogue)


@pytest.mark.parametrize("allowed", [True, False])
def test_on_demand_nothing_is_loaded_or_fetched_at_start(allowed: bool) -> None:
    models = Models(model=("hub/owls",), on_demand=True, allow_download=allowed)
    (config,) = engine_configs(Settings(models=models), None)
    assert config.models == ()
    (source,) = config.catalogue
    assert (source.id, source.may_download) == ("hub/owls", allowed)
    at_start = engine_configs(Settings(models=Models(model=("hub/owls",))), None)[0].models
    assert at_start[0].may_download


def test_a_folder_without_models_is_an_error(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", folder / "controlnet"):
        with pytest.raises(StartupError, match="--models-dir"):
            all_sources(Models(models_dir=str(path)))


def test_what_comes_and_goes_is_found_and_what_is_named_stays(folder: Path) -> None:
    models = Models(
        model=("owls=demo",), models_dir=str(folder), quantize=("sdxl/toads=int8",), variant="fp16"
    )
    found = models_folder(Settings(models=models), "secret")
    assert found is not None
    assert set(found.at_start) == {"sdxl/moths.v2", "sdxl/toads"}
    (folder / "sdxl" / "moths.v2.safetensors").unlink()
    (folder / "newts").mkdir()
    (folder / "newts" / "model_index.json").write_text("{}")
    sources = {source.id: source for source in found.find() or ()}
    assert set(sources) == {"newts", "sdxl/toads"}
    newts = sources["newts"]
    assert (newts.location, newts.variant, newts.token) == (str(folder / "newts"), "fp16", "secret")
    assert newts.quantize is None
    assert sources["sdxl/toads"] == found.at_start["sdxl/toads"]
    assert sources["sdxl/toads"].quantize is not None
    shutil.rmtree(folder)
    assert found.find() is None
    assert models_folder(Settings(), None) is None


def test_a_path_that_cannot_be_a_name_is_left_out(folder: Path) -> None:
    (folder / "my model.safetensors").touch()
    assert len(all_sources(Models(models_dir=str(folder)))) == 3
