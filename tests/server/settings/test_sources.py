from pathlib import Path

import pytest

from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Offload, Quantization, Quantize
from darkroom_server.settings import Engine, Models, Settings
from darkroom_server.settings.adapters import Adapters
from darkroom_server.settings.images import Images
from darkroom_server.settings.sources import (
    DEMO_ADAPTERS,
    adapter_places,
    controlnet_sources,
    engine_configs,
    model_sources,
)

OTHER = Models(model=("a=x/y",))


def test_the_demo_model_is_the_default() -> None:
    (source,) = model_sources(Models())
    assert source.id == "demo"
    assert Path(source.location).name == "demo_model"
    assert model_sources(Models(model=("pet=demo",)))[0].location == source.location


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", "org/name", None)),
        ("org/name@v1", ("org/name", "org/name", "v1")),
        ("sd=org/name@refs/pr/1", ("sd", "org/name", "refs/pr/1")),
        ("name", ("name", "name", None)),
    ],
)
def test_hub_ids(text: str, expected: tuple[str, str, str | None]) -> None:
    (source,) = model_sources(Models(model=(text,)))
    assert (source.id, source.location, source.revision) == expected


@pytest.mark.parametrize("name", ["plain", "with@at", "with=equals", "a=b@c"])
def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (named,) = model_sources(Models(model=(f"mine={folder}",)))
    assert (named.id, named.location, named.revision) == ("mine", str(folder), None)
    if name == "plain":
        (bare,) = model_sources(Models(model=(f"{folder}/",)))
        assert bare.id == "plain"


def test_the_id_of_a_single_file_is_its_stem(tmp_path: Path) -> None:
    file = tmp_path / "v1-5.safetensors"
    file.touch()
    (source,) = model_sources(Models(model=(str(file),), model_config="/some/folder"))
    assert (source.id, source.config) == ("v1-5", "/some/folder")


def test_the_id_of_a_relative_path_is_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "pictures")
    assert model_sources(Models(model=(".",)))[0].id == "pictures"


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        (("./nothing",), "no such file or folder, and no hub id either"),
        (("/nothing/here",), "no such file or folder"),
        (("=org/name",), "the name before = is missing"),
        (("org/name@",), "the revision after @ is missing"),
        (("a b=org/name",), "'a b' cannot be a model's name"),
        (("a=x/y", "a=x/z"), "another model is named 'a' already"),
        (("",), "no such file or folder"),
    ],
)
def test_an_invalid_model_is_reported(models: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(StartupError) as caught:
        model_sources(Models(model=models))
    assert complaint in str(caught.value)


def test_a_folder_with_an_invalid_name_needs_an_explicit_id(tmp_path: Path) -> None:
    folder = tmp_path / "with@at"
    folder.mkdir()
    with pytest.raises(StartupError, match="put NAME="):
        model_sources(Models(model=(str(folder),)))


def test_the_engine_gets_its_section_and_the_token_is_not_shown() -> None:
    settings = Settings(
        models=Models(model=("a=x/y",), variant="fp16"),
        engine=Engine(device="cuda:1", slice_size="max", autocast=False, threads=3, max_rows=5),
    )
    (config,) = engine_configs(settings, hub_token="hf_secret")
    assert (config.device, config.slice_size, config.autocast) == ("cuda:1", "max", False)
    assert (config.threads, config.max_rows) == (3, 5)
    assert (config.models[0].variant, config.models[0].token) == ("fp16", "hf_secret")
    assert "hf_secret" not in repr(config)
    assert "hf_secret" not in repr(settings)


def test_adapters_come_from_the_list_and_then_from_the_folder(tmp_path: Path) -> None:
    for name in ("outline", "pastel", "not allowed"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    file = str(tmp_path / "outline.safetensors")
    adapters = Adapters(lora=(f"mine={file}", "pastel=org/name@v2"), lora_dir=str(tmp_path))
    settings = Settings(models=OTHER, adapters=adapters)
    found = adapter_places(settings, hub_token="hf_secret").sources()
    assert [(each.id, each.location, each.revision) for each in found] == [
        ("mine", file, None),
        ("pastel", "org/name", "v2"),
        ("outline", file, None),
    ]
    assert [each.from_folder for each in found] == [False, False, True]
    assert "hf_secret" not in repr(found)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("org/name", "put NAME="),
        ("=org/name", "put NAME="),
        ("a=org/name@", "the revision after @ is missing"),
        ("a=./nothing", "no such file or folder, and no hub id either"),
    ],
)
def test_an_invalid_adapter_is_reported(text: str, complaint: str) -> None:
    with pytest.raises(StartupError) as caught:
        adapter_places(Settings(adapters=Adapters(lora=(text,))))
    assert complaint in str(caught.value)


def test_the_demo_model_brings_its_adapters() -> None:
    (config,) = engine_configs(Settings(models=Models(model=("pet=demo", "a=x/y"))), None)
    assert [each.id for each in config.adapters] == ["night", "outline"]
    assert config.adapters_may_come
    assert [(each.id, each.model) for each in config.controlnets] == [("position", "pet")]
    locations = [each.location for each in config.adapters]
    locations += [each.location for each in config.controlnets]
    assert all(Path(location).exists() for location in locations)


def test_another_model_brings_none() -> None:
    (config,) = engine_configs(Settings(models=OTHER), None)
    assert (config.adapters, config.controlnets, config.adapters_may_come) == ((), (), False)


def test_adapters_of_the_settings_replace_the_demo_models(tmp_path: Path) -> None:
    for name in ("night", "outline"):
        (tmp_path / f"{name}.safetensors").touch()
    mine = str(tmp_path / "outline.safetensors")
    adapters = Adapters(
        lora=(f"outline={mine}",), lora_dir=str(tmp_path), controlnet=(f"position={tmp_path}",)
    )
    (config,) = engine_configs(Settings(adapters=adapters), None)
    assert {each.id: Path(each.location).parent for each in config.adapters} == {
        "outline": tmp_path,
        "night": tmp_path,
    }
    assert [each.location for each in config.controlnets] == [str(tmp_path)]


def test_a_folder_of_adapters_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no such folder"):
        adapter_places(Settings(adapters=Adapters(lora_dir=str(tmp_path / "nothing"))))


def test_the_numbers_of_adapters_are_bounded() -> None:
    adapters = Adapters(max_loras=6, max_request_loras=2, max_controls=3)
    (config,) = engine_configs(Settings(adapters=adapters), None)
    assert (config.max_loras, config.max_request_loras, config.max_controls) == (6, 2, 3)


def test_controlnets_are_for_each_model_or_for_one(tmp_path: Path) -> None:
    settings = Settings(
        models=Models(model=("a=demo", "b=demo")),
        adapters=Adapters(
            controlnet=(f"edges={tmp_path}", "a:pose=org/name@v2", f"b:pose={tmp_path}"),
            max_controls=2,
        ),
    )
    (config,) = engine_configs(settings, "hf_secret")
    assert [(e.id, e.model, e.location, e.revision) for e in config.controlnets] == [
        ("edges", None, str(tmp_path), None),
        ("pose", "a", "org/name", "v2"),
        ("pose", "b", str(tmp_path), None),
        *(("position", model, str(DEMO_ADAPTERS / "controlnets/position"), None) for model in "ab"),
    ]
    assert config.max_controls == 2
    assert "hf_secret" not in repr(config.controlnets)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (("org/name",), "put NAME="),
        (("a:=org/name",), "put NAME="),
        (("c:pose=org/name",), "no model is named 'c'"),
        (("pose=no such folder",), "no such file or folder, and no hub id either"),
        (("pose=org/name", "pose=org/other"), "another ControlNet is named 'pose' already"),
        (("pose=org/name", "a:pose=org/other"), "another ControlNet is named 'pose' already"),
        (("a:pose=org/name", "pose=org/other"), "another ControlNet is named 'pose' already"),
        (("ink=org/name",), "a LoRA adapter is named 'ink' already"),
    ],
)
def test_an_invalid_controlnet_is_reported(texts: tuple[str, ...], complaint: str) -> None:
    settings = Settings(
        models=Models(model=("a=demo", "b=demo")),
        adapters=Adapters(lora=("ink=org/ink",), controlnet=texts),
    )
    with pytest.raises(StartupError) as caught:
        controlnet_sources(settings)
    assert complaint in str(caught.value)


def test_the_prompt_cache_is_configured_for_each_engine() -> None:
    assert engine_configs(Settings(), None)[0].prompt_cache_bytes == 256 * 1024**2
    settings = Settings(engine=Engine(prompt_cache_bytes=0, device="cuda:0,cuda:1"))
    assert [each.prompt_cache_bytes for each in engine_configs(settings, None)] == [0, 0]


def test_an_ip_adapter_belongs_to_a_model(tmp_path: Path) -> None:
    file = tmp_path / "at@home.safetensors"
    file.touch()
    hub = "owner/name/models/ip-adapter_sd15.safetensors"
    settings = Settings(
        models=Models(model=("a=x/y", "b=x/y", "c=x/y")),
        adapters=Adapters(ip_adapter=(f"a={file}", f"b={hub}@v2")),
        images=Images(max_reference_images=2),
    )
    (config,) = engine_configs(settings, "hf_secret")
    found = [model.ip_adapter for model in config.models]
    assert [each and (each.id, each.location, each.revision, each.token) for each in found] == [
        ("a", str(file), None, "hf_secret"),
        ("b", hub, "v2", "hf_secret"),
        None,
    ]
    assert config.max_reference_images == 2
    assert "hf_secret" not in repr(found)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (("owner/name/a.safetensors",), "put MODEL= before the file, with a model of: model"),
        (("other=owner/name/a.safetensors",), "put MODEL= before the file"),
        (("model=owner/name/a.safetensors@",), "the revision after @ is missing"),
        (("model=owner/name",), "no such file, and no .safetensors of the hub either"),
        (("model=owner/name/a.safetensors",) * 2, "model 'model' has another one already"),
    ],
)
def test_an_invalid_ip_adapter_is_reported(texts: tuple[str, ...], complaint: str) -> None:
    settings = Settings(models=Models(model=("model=x/y",)), adapters=Adapters(ip_adapter=texts))
    with pytest.raises(StartupError) as caught:
        engine_configs(settings, None)
    assert complaint in str(caught.value)


def test_weights_are_stored_in_fewer_bits_by_model() -> None:
    models = Models(
        model=("a=x/y", "b=x/y", "c=x/y"),
        quantize=("a=int8", "b=gguf:/models/q:4.gguf"),
        offload=Offload.GROUP,
    )
    (config,) = engine_configs(Settings(models=models), None)
    assert [model.quantize for model in config.models] == [
        Quantize(Quantization.INT8),
        Quantize(Quantization.GGUF, "/models/q:4.gguf"),
        None,
    ]
    assert config.offload is Offload.GROUP


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (("int8",), "put MODEL= before it, with a model of: model"),
        (("other=int8",), "put MODEL= before it"),
        (("model=int4",), "use int8, fp8, fp8-dynamic, nf4 or gguf:FILE"),
        (("model=gguf",), "use int8, fp8, fp8-dynamic, nf4 or gguf:FILE"),
        (("model=gguf:",), "use int8, fp8, fp8-dynamic, nf4 or gguf:FILE"),
        (("model=int8:file",), "use int8, fp8, fp8-dynamic, nf4 or gguf:FILE"),
        (("model=int8", "model=fp8"), "model 'model' is quantised already"),
    ],
)
def test_an_invalid_quantization_is_reported(texts: tuple[str, ...], complaint: str) -> None:
    settings = Settings(models=Models(model=("model=x/y",), quantize=texts))
    with pytest.raises(StartupError) as caught:
        engine_configs(settings, None)
    assert complaint in str(caught.value)
