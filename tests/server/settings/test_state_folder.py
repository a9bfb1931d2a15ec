"""``--state-dir``: everything that the server writes is below one folder."""

from pathlib import Path

import pytest

from darkroom_server.settings import Engine, Settings, Storage
from darkroom_server.settings.load import load_settings
from darkroom_server.settings.sources import engine_configs, load_times_file
from darkroom_server.settings.state_folder import (
    create_scratch_folders,
    measurement_folder,
    state_folder,
)


def test_the_default_is_the_cache_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert state_folder(Storage()) == tmp_path / "cache" / "darkroom"
    for invalid in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert state_folder(Storage()) == tmp_path / "home" / ".cache" / "darkroom"


def test_measurements_and_load_times_are_below_it(tmp_path: Path) -> None:
    settings = Settings(storage=Storage(state_dir=str(tmp_path)))
    assert measurement_folder(settings) == tmp_path / "measurements"
    (config,) = engine_configs(settings, hub_token=None)
    assert config.measurement_cache == str(tmp_path / "measurements")
    assert config.compile_cache == str(tmp_path / "compiled")
    assert load_times_file(settings)[0] == tmp_path / "measurements" / "load-times.json"


def test_no_measurement_cache_keeps_no_folder(tmp_path: Path) -> None:
    settings = Settings(
        storage=Storage(state_dir=str(tmp_path)), engine=Engine(measurement_cache=False)
    )
    assert measurement_folder(settings) is None
    (config,) = engine_configs(settings, hub_token=None)
    assert config.compile_cache is None


def test_a_relative_folder_is_one_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert state_folder(Storage(state_dir="state")) == tmp_path / "state"


def test_the_environment_and_the_file_set_it(tmp_path: Path) -> None:
    file = tmp_path / "darkroom.toml"
    file.write_text("[storage]\nstate_dir = '/from/the/file'\n")
    assert load_settings({}, {}, str(file)).settings.storage.state_dir == "/from/the/file"
    environ = {"DARKROOM_SERVE_STATE_DIR": "/from/the/environment"}
    loaded = load_settings({}, environ, str(file))
    assert loaded.settings.storage.state_dir == "/from/the/environment"


def test_temporary_files_are_below_it_unless_a_variable_names_another_folder(
    tmp_path: Path,
) -> None:
    storage = Storage(state_dir=str(tmp_path / "new"))
    variables = create_scratch_folders(storage, {"CUDA_CACHE_PATH": "/mine", "TMPDIR": ""})
    assert variables == {
        "TMPDIR": str(tmp_path / "new" / "tmp"),
        "PYTORCH_KERNEL_CACHE_PATH": str(tmp_path / "new" / "torch-kernels"),
    }
    assert all(Path(path).is_dir() for path in variables.values())
    assert create_scratch_folders(Storage(), {}) == {}
