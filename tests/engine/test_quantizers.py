"""Weights in fewer bits by torchao, and from GGUF files: `make test-quantized`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from bench.tiny_families.stable_diffusion_3 import write_sd3
from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Quantization
from darkroom_server.engine.warmup.formats import Hardware
from darkroom_server.engine.weights.parts import Part
from darkroom_server.engine.weights.stored import is_plain, is_quantized

from .quantized import difference, loaded_bytes, loop, picture, picture_of, source

pytestmark = pytest.mark.quantized


def test_eight_bit_integers_make_nearly_the_same_picture(tiny_folder: Path) -> None:
    plain = picture(source(tiny_folder))
    with loop(source(tiny_folder, Quantization.INT8)) as made:
        assert made.models["tiny"].info.runtime.quantization == "int8"
        quantised = picture_of(made)
    assert 0 < difference(plain, quantised) < 12
    assert picture(source(tiny_folder, Quantization.INT8)) == quantised


def test_they_take_less_memory(tiny_folder: Path) -> None:
    plain = loaded_bytes(source(tiny_folder))
    int8 = loaded_bytes(source(tiny_folder, Quantization.INT8))
    # Of this UNet about half are convolutions, which stay as they are.
    assert int8["unet"] < 0.85 * plain["unet"]
    assert int8["text_encoder"] < plain["text_encoder"]
    assert int8["vae"] == plain["vae"]


def scaled_mm(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What ``torch._scaled_mm`` computes on a GPU, in float32."""
    assert first.dtype == second.dtype == torch.float8_e4m3fn
    product = (first.float() * scale_a) @ (second.float() * scale_b)
    return (product if bias is None else product + bias).to(out_dtype)


@pytest.fixture
def float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had products in 8-bit floats."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda _: None)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(Hardware, "of", lambda _: Hardware(capability=(8, 9)))


BFLOAT16: dict[str, Any] = {"dtype": Dtype.BFLOAT16}
DYNAMIC = Quantization.FP8_DYNAMIC


@pytest.mark.usefixtures("float8")
def test_products_in_eight_bit_floats_make_nearly_the_same_picture(tiny_folder: Path) -> None:
    plain = picture(source(tiny_folder), **BFLOAT16)
    with loop(source(tiny_folder, DYNAMIC), **BFLOAT16) as made:
        model = made.models["tiny"]
        assert model.info.runtime.quantization == "fp8-dynamic"
        linear = [each for each in model.unet.modules() if isinstance(each, torch.nn.Linear)]
        packed = [each for each in linear if not is_plain(each.weight)]
        assert packed
        for each in linear:
            sides = each.weight.shape
            assert (each in packed) is not bool(sides[0] % 16 or sides[1] % 16)
        assert not is_quantized(model.prompts._text_encoder)
        found = picture_of(made)
    assert 0 < difference(plain, found) < 12


@pytest.mark.usefixtures("float8")
def test_a_row_does_not_scale_the_others(tiny_folder: Path) -> None:
    with loop(source(tiny_folder, DYNAMIC), **BFLOAT16) as made:
        linear = next(
            each
            for each in made.models["tiny"].unet.modules()
            if isinstance(each, torch.nn.Linear) and not is_plain(each.weight)
        )
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, 3, linear.in_features, generator=generator).bfloat16()
        with torch.inference_mode():
            alone = linear(rows[:1])
            rows[1] *= 1000
            together = linear(rows)[:1]
    assert torch.equal(alone, together)


@pytest.mark.usefixtures("float8")
@pytest.mark.parametrize("kind", [DYNAMIC, Quantization.INT8])
def test_packed_weights_move_to_a_device(kind: Quantization, tiny_folder: Path) -> None:
    """In inference mode, as an engine loads; ``meta`` stands for a GPU."""
    with loop(source(tiny_folder, kind), **BFLOAT16) as made:
        unet = made.models["tiny"].unet
    part = Part(unet)
    with torch.inference_mode():
        part.take(unet, torch.device("meta"), keep=False)
    assert {weight.device.type for weight in unet.parameters()} == {"meta"}
    assert is_quantized(unet)


@pytest.mark.usefixtures("float8")
def test_files_with_such_weights_are_recognised(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    unet = UNet2DConditionModel.from_pretrained(
        tiny_folder,
        subfolder="unet",
        quantization_config=TorchAoConfig(config),
        torch_dtype=torch.bfloat16,
    )
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    with loop(source(folder), **BFLOAT16) as made:
        runtime = made.models["tiny"].info.runtime
        assert runtime.quantization == "fp8-dynamic"
        assert not runtime.takes_exact
        assert picture_of(made)


def write_gguf(transformer: SD3Transformer2DModel, file: Path) -> dict[str, torch.Tensor]:
    """Write weights with 8 bits in the linear layers; returns what they are when they are read."""
    import gguf  # Not for the other tests.

    writer = gguf.GGUFWriter(file, "sd3")
    kept = {}
    for name, weight in transformer.state_dict().items():
        array = weight.float().numpy()
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            array = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, array)
        kept[name] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_gguf_file_makes_the_picture_of_its_own_weights(tmp_path: Path) -> None:
    folder, file = write_sd3(tmp_path / "sd3"), tmp_path / "q8.gguf"
    transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    kept = write_gguf(transformer, file)
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    transformer.load_state_dict(kept)
    transformer.save_pretrained(same / "transformer")
    expected, other = picture(source(same), rows=2), picture(source(folder), rows=2)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    shutil.copy(same / "transformer" / "config.json", folder / "transformer")
    model = source(folder, Quantization.GGUF, file)
    with loop(model, rows=2) as made:
        info = made.models["tiny"].info
        assert info.runtime.quantization == "gguf:q8.gguf"
        assert "loras" not in info.optional_fields
        found = picture_of(made)
    assert difference(found, expected) < 0.05
    assert difference(found, other) > 2 * difference(found, expected)


def test_files_that_are_quantised_already_say_so_themselves(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    unet = UNet2DConditionModel.from_pretrained(
        tiny_folder,
        subfolder="unet",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    with loop(source(folder)) as made:
        assert made.models["tiny"].info.runtime.quantization == "int8"
        assert picture_of(made)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "other"
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="quantised by 'other'"):
        picture(source(folder))
