"""Weights in 8-bit floats, weights that are copied to the device for each call, and rejections."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import Dtype, ModelSource, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Offload, Quantization
from darkroom_server.engine.loading import quantization
from darkroom_server.engine.loading.pipeline import find_model
from darkroom_server.engine.loading.read_model import files_of
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.warmup.formats import Hardware
from darkroom_server.engine.weights.stored import is_quantized

from .conftest import config_for
from .quantized import difference, loaded_bytes, loop, picture, picture_of, source


def test_eight_bit_floats_make_nearly_the_same_picture(tiny_folder: Path) -> None:
    plain = picture(source(tiny_folder))
    with loop(source(tiny_folder, Quantization.FP8)) as made:
        assert made.models["tiny"].info.runtime.quantization == "fp8"
        quantised = picture_of(made)
    assert 0 < difference(plain, quantised) < 12
    assert picture(source(tiny_folder, Quantization.FP8)) == quantised


def test_they_take_less_memory(tiny_folder: Path) -> None:
    plain, fp8 = (loaded_bytes(source(tiny_folder, kind)) for kind in (None, Quantization.FP8))
    assert fp8["unet"] < 0.4 * plain["unet"]
    assert fp8["text_encoder"] == plain["text_encoder"]


def is_offloaded(module: Any) -> bool:
    return any(hasattr(each, "_diffusers_hook") for each in module.modules())


@pytest.mark.parametrize("offload", [Offload.TEXT_ENCODER, Offload.GROUP])
def test_offloaded_weights_make_the_same_picture(offload: Offload, tiny_folder: Path) -> None:
    expected = picture(source(tiny_folder))
    with loop(source(tiny_folder), offload=offload) as made:
        model = made.models["tiny"]
        assert model.info.runtime.offload == offload
        assert is_offloaded(model.unet) == (offload is Offload.GROUP)
        assert is_offloaded(model.prompts._text_encoder)
        assert ("loras" in model.info.optional_fields) <= (offload is not Offload.GROUP)
        assert picture_of(made) == expected


def line(model: ModelSource, **fields: Any) -> str:
    with pytest.raises(StartupError) as caught:
        start_loop(config_for(Path(model.location), models=(model,), **fields), lambda _: None)
    return str(caught.value)


def test_a_case_without_its_package_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(pytest.skip.Exception, match="torchao is not installed"):
        need_package(Quantization.INT8)
    need_package(Quantization.FP8)


def test_what_cannot_run_here_is_rejected_with_a_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        assert "needs a GPU with CUDA" in line(source(tiny_folder, Quantization.NF4))
        int8 = source(tiny_folder, Quantization.INT8)
        assert "goes with --quantize tiny=fp8" in line(int8, offload=Offload.GROUP)
        missing = tmp_path / "missing.gguf"
        assert "no such file" in line(source(tiny_folder, Quantization.GGUF, missing))
    extras = ("int8", "fp8-dynamic", "nf4", "gguf")
    for kind, extra in zip(extras, extras, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda _: None)
            file = tmp_path / "a.gguf" if kind == "gguf" else None
            assert f"'darkroom-server[{extra}]'" in line(
                source(tiny_folder, Quantization(kind), file)
            )
    assert set(quantization.PACKAGES) == set(Quantization) - {Quantization.FP8}


DYNAMIC = Quantization.FP8_DYNAMIC
BFLOAT16: dict[str, Any] = {"dtype": Dtype.BFLOAT16}


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("capability", "fields", "words"),
    [
        (
            None,
            BFLOAT16,
            "needs a GPU with CUDA of compute capability 8.9 or later, and the models",
        ),
        (
            (8, 6),
            BFLOAT16,
            "needs compute capability 8.9 or later, and cpu has 8.6; use --quantize",
        ),
        ((8, 9), {}, "needs bfloat16, and the model runs in float32; add --dtype bfloat16"),
        ((9, 0), {**BFLOAT16, "autocast": True}, "does not go with --autocast; leave that out"),
        ((9, 0), {**BFLOAT16, "offload": Offload.GROUP}, "--offload group goes with --quantize"),
    ],
)
def test_products_in_eight_bit_floats_need_a_gpu_that_has_them(
    capability: tuple[int, int] | None,
    fields: dict[str, Any],
    words: str,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hardware, "of", lambda _: Hardware(capability=capability))
    assert words in line(source(tiny_folder, DYNAMIC), **fields)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("offload", [Offload.NONE, Offload.TEXT_ENCODER])
def test_how_a_model_with_such_products_runs(
    offload: Offload, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "of", lambda _: Hardware(capability=(8, 9)))
    fields: dict[str, Any] = {**BFLOAT16, "preset": Preset.FRUGAL, "autocast": None}
    config = config_for(tiny_folder, **fields, offload=offload)
    for kind, autocast in ((DYNAMIC, False), (None, True)):
        files, runtime = files_of(source(tiny_folder, kind), config, None)
        assert runtime.quantization == (kind or "")
        assert runtime.autocast is autocast
        assert not runtime.fp8_storage
        packed = {part for part in files.parts if quantization.is_quantized_part(files, part)}
        assert packed == ({"unet"} if kind else set())
    assert "autocast is off" in files_of(source(tiny_folder, DYNAMIC), config, None)[1].preset_rule


def test_files_with_such_weights_say_so_themselves(tiny_folder: Path, tmp_path: Path) -> None:
    for name, kind in (
        ("Float8DynamicActivationFloat8WeightConfig", DYNAMIC),
        ("Int8WeightOnlyConfig", Quantization.INT8),
    ):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / name))
        file = folder / "unet" / "config.json"
        stored = {"quant_method": "torchao", "quant_type": {"default": {"_type": name}}}
        config = {**json.loads(file.read_text()), "quantization_config": stored}
        file.write_text(json.dumps(config))
        assert quantization.own_quantization(folder, "unet") is kind
        assert quantization.own_quantization(folder, "vae") is None
        files = find_model(source(folder), safety_checker=False)
        assert quantization.quantization_of(files) == kind


def need_package(kind: Quantization) -> None:
    """Skip a test on a GPU if there is no package for ``kind``."""
    package, _ = quantization.PACKAGES.get(kind, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; build/quantizers may have it")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Quantization.NF4, Quantization.INT8, Quantization.FP8])
@pytest.mark.parametrize("offload", Offload)
def test_on_a_gpu(kind: Quantization, offload: Offload, tiny_folder: Path) -> None:
    need_package(kind)
    if offload is not Offload.NONE and kind is not Quantization.FP8:
        model = source(tiny_folder, kind)
        assert "--offload" in line(model, device="cuda", offload=offload)
        return
    fields: dict[str, Any] = {"device": "cuda", "preset": Preset.FAST, "offload": offload}
    plain = picture(source(tiny_folder), **{**fields, "offload": Offload.NONE})
    assert difference(plain, picture(source(tiny_folder, kind), **fields)) < 24


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [Offload.NONE, Offload.TEXT_ENCODER])
def test_products_in_eight_bit_floats_on_a_gpu(offload: Offload, tiny_folder: Path) -> None:
    need_package(DYNAMIC)
    model, hardware = source(tiny_folder, DYNAMIC), Hardware.of(torch.device("cuda"))
    fields: dict[str, Any] = {"device": "cuda", "preset": Preset.FAST, **BFLOAT16}
    if (hardware.capability or (0, 0)) < quantization.FLOAT8:
        assert "needs compute capability 8.9 or later" in line(model, **fields)
        return
    plain = picture(source(tiny_folder), **fields)
    with loop(model, **fields, offload=offload) as made:
        assert made.models["tiny"].info.runtime.quantization == "fp8-dynamic"
        assert is_quantized(made.models["tiny"].unet)
        found = picture_of(made)
    assert 0 < difference(plain, found) < 24
