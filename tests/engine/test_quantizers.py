"""Weights in fewer bits by torchao, and from GGUF files: `make test-quantized`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from darkroom_server.core.errors import StartupError
from darkroom_server.core.quantization import Quantization

from .families.stable_diffusion_3 import write_sd3
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
