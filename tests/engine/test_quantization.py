"""Weights in 8-bit floats, weights that are copied to the device for each call, and rejections."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from darkroom_server.core.engine_config import ModelSource, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Offload, Quantization
from darkroom_server.engine.loading import quantization
from darkroom_server.engine.loading.startup import start_loop

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
    for kind, extra in (("int8", "int8"), ("nf4", "nf4"), ("gguf", "gguf")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda _: None)
            file = tmp_path / "a.gguf" if kind == "gguf" else None
            assert f"'darkroom-server[{extra}]'" in line(
                source(tiny_folder, Quantization(kind), file)
            )
    assert set(quantization.PACKAGES) == set(Quantization) - {Quantization.FP8}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Quantization.NF4, Quantization.INT8, Quantization.FP8])
@pytest.mark.parametrize("offload", Offload)
def test_on_a_gpu(kind: Quantization, offload: Offload, tiny_folder: Path) -> None:
    if offload is not Offload.NONE and kind is not Quantization.FP8:
        model = source(tiny_folder, kind)
        assert "--offload" in line(model, device="cuda", offload=offload)
        return
    fields: dict[str, Any] = {"device": "cuda", "preset": Preset.FAST, "offload": offload}
    plain = picture(source(tiny_folder), **{**fields, "offload": Offload.NONE})
    assert difference(plain, picture(source(tiny_folder, kind), **fields)) < 24
