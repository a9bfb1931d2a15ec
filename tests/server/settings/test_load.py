from pathlib import Path

import pytest

from darkroom_server.core.engine_config import Attention, Dtype, Preset
from darkroom_server.core.errors import InvalidSettings, StartupError
from darkroom_server.settings import Settings
from darkroom_server.settings.load import load_settings
from darkroom_server.settings.option import options_of


def toml(folder: Path, text: str) -> str:
    path = folder / "darkroom.toml"
    path.write_text(text)
    return str(path)


def test_defaults_apply_without_any_source() -> None:
    loaded = load_settings({}, {})
    assert loaded.settings == Settings()
    assert loaded.warnings == ()


def test_a_flag_overrides_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    config = toml(tmp_path, "[network]\nport = 1\nmetrics_port = 2\nhost = '::'\n")
    environ = {"DARKROOM_SERVE_PORT": "11", "DARKROOM_SERVE_METRICS_PORT": "12"}
    network = load_settings({"port": "21"}, environ, config).settings.network
    assert (network.port, network.metrics_port, network.host) == (21, 12, "::")
    named = environ | {"DARKROOM_SERVE_CONFIG": config}
    assert load_settings({}, named).settings.network.host == "::"


def test_text_is_converted_to_the_declared_type() -> None:
    environ = {
        "DARKROOM_SERVE_MODEL": "demo, b=x/y@main",
        "DARKROOM_SERVE_DTYPE": "bfloat16",
        "DARKROOM_SERVE_PRESET": "tiny",
        "DARKROOM_SERVE_ATTENTION": "sliced",
        "DARKROOM_SERVE_SLICE_SIZE": "4",
        "DARKROOM_SERVE_AUTOCAST": "false",
        "DARKROOM_SERVE_VAE_TILING": "1",
        "DARKROOM_SERVE_MAX_ROWS": "6",
        "DARKROOM_SERVE_GRACE": "2.5",
        "DARKROOM_SERVE_REFLECTION": "off",
        "DARKROOM_SERVE_VARIANT": "",
        "DARKROOM_SERVE_MODEL_CONFIG": "/a/folder",
    }
    settings = load_settings({}, environ).settings
    assert settings.models.model == ("demo", "b=x/y@main")
    assert settings.models.variant is None
    assert settings.models.model_config == "/a/folder"
    assert settings.engine.dtype is Dtype.BFLOAT16
    assert settings.engine.preset is Preset.TINY
    assert settings.engine.attention is Attention.SLICED
    assert settings.engine.slice_size == "4"
    assert settings.engine.autocast is False
    assert settings.engine.vae_tiling is True
    assert settings.engine.max_rows == 6
    assert settings.shutdown.grace == 2.5
    assert settings.network.reflection is False


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[network]\nprot = 1", "unknown key 'network.prot'; did you mean 'network.port'?"),
        ("port = 1", "unknown key 'port'; did you mean 'network.port'?"),
        ("[netwrok]\nport = 1", "unknown key 'netwrok'; did you mean 'network'?"),
        ("[network.port]\nnumber = 1", "network.port: must be a valid integer"),
        ("[network]\nmax-rows = 1", "unknown key 'network.max-rows'; did you mean 'engine.max"),
        ("network = 1", "'network' is a table; write [network] above its keys"),
        ("[network", "is not TOML"),
        ("[engine]\npreset = 'quick'", "must be one of auto, frugal, fast, max, tiny, not 'quick'"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(StartupError) as caught:
        load_settings({}, {}, toml(tmp_path, text))
    assert complaint in str(caught.value)
    assert "darkroom.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    text = """
[network]
prot = 1
port = "x"
[netwrok]
host = "a"
[engine]
preset = "quick"
slice_size = 0
threads = 0
"""
    with pytest.raises(InvalidSettings) as caught:
        load_settings({"grace": "-1"}, {}, toml(tmp_path, text))
    found = [problem.rpartition(".toml: ")[2] for problem in caught.value.problems]
    assert [problem.partition(":")[0] for problem in found] == [
        "unknown key 'network.prot'; did you mean 'network.port'?",
        "unknown key 'netwrok'; did you mean 'network'?",
        "engine.preset",
        "engine.slice_size",
        "engine.threads",
        "network.port",
        "--grace",
    ]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        load_settings({}, {}, str(tmp_path / "nothing.toml"))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("port", "x", "must be a valid integer, not 'x'"),
        ("port", "65536", "must be less than or equal to 65535, not '65536'"),
        ("port", "-1", "must be greater than or equal to 0"),
        ("device", "gpu", "must be auto, cpu, cuda, cuda:N"),
        ("device", "cuda:", "must be auto, cpu, cuda, cuda:N"),
        ("slice_size", "0", "must be auto, max, N"),
        ("dtype", "int8", "must be one of auto, float16, bfloat16, float32"),
        ("log_format", "xml", "must be one of auto, console, json"),
        ("autocast", "maybe", "must be a valid boolean"),
        ("threads", "0", "must be greater than or equal to 1"),
        ("prompt_cache_bytes", "-1", "must be greater than or equal to 0"),
        ("max_resident_samples", "0", "must be greater than or equal to 1"),
        ("grace", "nan", "must be"),
        ("grace", "-1", "must be greater than or equal to 0"),
    ],
)
def test_an_invalid_value_is_reported_with_its_origin(
    name: str, value: str, complaint: str
) -> None:
    with pytest.raises(StartupError) as caught:
        load_settings({name: value}, {})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}: {complaint}")
    variable = f"DARKROOM_SERVE_{name.upper()}"
    with pytest.raises(StartupError, match=f"^{variable}: "):
        load_settings({}, {variable: value})


def test_an_unknown_variable_is_a_warning() -> None:
    warnings = load_settings({}, {"DARKROOM_SERVE_PROT": "1", "DARKROOM_OTHER": "1"}).warnings
    assert warnings == (
        "DARKROOM_SERVE_PROT is not a setting and is ignored; did you mean DARKROOM_SERVE_PORT?",
    )


def test_every_setting_has_unique_names() -> None:
    options = list(options_of(Settings))
    assert len({option.name for option in options}) == len(options)
    for option in options:
        assert option.setting.help.endswith(".")
        assert option.is_switch or option.setting.metavar or option.choices, option.flag
