"""Weights apart from their modules: copied out of files, and used by several modules."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import Dtype, ModelSource
from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.core.quantization import Quantization, Quantize
from darkroom_server.engine.families.stable_diffusion_xl import StableDiffusionXL
from darkroom_server.engine.loading.pipeline import ModelFiles, find_model
from darkroom_server.engine.warmup.presets import Runtime, resolve
from darkroom_server.engine.weights.owned import ALIGNMENT, owned
from darkroom_server.engine.weights.part_keys import part_keys
from darkroom_server.engine.weights.parts import Part, weights_in

from .conftest import config_for
from .folders import edit_index, edit_json, save_elsewhere

CPU = torch.device("cpu")


def mapped(offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` at an address with the remainder ``offset``, as in a mapped file."""
    buffer = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (offset - buffer.data_ptr()) % ALIGNMENT
    flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("offset", [0, 8, 24, 60])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_copy_has_the_values_strides_and_alignment(
    offset: int, layout: torch.memory_format
) -> None:
    before = mapped(offset, torch.randn(4, 3, 3, 3).to(memory_format=layout))
    assert before.data_ptr() % ALIGNMENT == offset
    after = owned(before)
    assert after.data_ptr() != before.data_ptr()
    assert after.data_ptr() % ALIGNMENT == offset
    assert after.stride() == before.stride()
    values = before.clone()
    before.zero_()  # As if the file changed.
    assert torch.equal(after, values)


def test_weights_that_share_memory_with_themselves_are_copied_too() -> None:
    row = mapped(8, torch.randn(4))
    after = owned(row.expand(4, 4))
    assert torch.equal(after, row.expand(4, 4))
    assert after.data_ptr() != row.data_ptr()


def normalised() -> Any:
    """A module with parameters, of which two are one, and buffers."""
    layer = torch.nn.Linear(4, 4)
    module = torch.nn.Sequential(layer, torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)).eval()
    module[2].weight = layer.weight
    return module


@torch.inference_mode()
def test_modules_of_a_part_share_its_weights_and_nothing_else() -> None:
    first = normalised()
    part = Part(first)
    before = [each.data_ptr() for each in weights_in(first)]
    part.take(first, CPU, keep=False)
    second: Any = part.module(CPU)
    pointers = [each.data_ptr() for each in weights_in(first)]
    assert not set(pointers) & set(before), "they were copied"
    assert [each.data_ptr() for each in weights_in(second)] == pointers
    assert second[2].weight is second[0].weight
    assert part.bytes == sum(each.nbytes for each in weights_in(first))
    inputs = torch.randn(2, 4)
    expected = first(inputs)
    assert torch.equal(second(inputs), expected)
    second[0].register_forward_hook(lambda *_: torch.zeros(2, 4))
    assert not torch.equal(second(inputs), expected)
    assert torch.equal(first(inputs), expected)
    first.to(device="meta")  # As a model that is unloaded.
    assert torch.equal(part.module(CPU)(inputs), expected)


def test_a_module_that_cannot_be_copied_is_loaded_all_the_same() -> None:
    module = normalised()
    module.lock = threading.Lock()
    part = Part(module)
    part.take(module, CPU, keep=False)
    assert not part.reusable
    assert part.bytes


def described(folder: Path, dtype: Dtype = Dtype.FLOAT32) -> tuple[ModelFiles, Runtime]:
    source = ModelSource(id="tiny", location=str(folder))
    files = find_model(source, safety_checker=False)
    return files, resolve(config_for(folder, dtype=dtype), files.family.half)


def test_equal_files_have_equal_keys(tiny_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_folder, tmp_path / "copied"))
    keys = part_keys(*described(tiny_folder))
    assert set(keys) == {"unet", "vae", "text_encoder"}
    assert part_keys(*described(copied)) == keys
    assert not set(keys.values()) & set(part_keys(*described(copied, Dtype.BFLOAT16)).values())
    edit_json(copied / "vae" / "config.json", scaling_factor=0.2)
    changed = part_keys(*described(copied))
    assert {part for part in keys if changed[part] != keys[part]} == {"vae"}
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert part_keys(*described(copied))["unet"] != keys["unet"]
    assert part_keys(*described(copied))["text_encoder"] == keys["text_encoder"]


def test_who_saved_a_component_is_not_in_its_key(tiny_folder: Path, tmp_path: Path) -> None:
    keys = part_keys(*described(tiny_folder))
    copied = save_elsewhere(Path(shutil.copytree(tiny_folder, tmp_path / "copied")))
    assert part_keys(*described(copied)) == keys
    encoder = copied / "text_encoder" / "config.json"
    nested = {"hidden_size": 8, "torch_dtype": "float16", "_name_or_path": "there"}
    edit_json(encoder, text_config=nested, vocabulary={"dtype": 7})
    before = part_keys(*described(copied))["text_encoder"]
    edit_json(encoder, text_config={"hidden_size": 8})
    assert part_keys(*described(copied))["text_encoder"] == before
    real: dict[str, Any]
    for real in (
        {"text_config": {"hidden_size": 16}},
        {"vocabulary": {}},
        {"hidden_act": "gelu"},
        {"num_hidden_layers": 2},
    ):
        edit_json(encoder, **real)
        changed = part_keys(*described(copied))
        assert changed["text_encoder"] != before, real
        assert (changed["unet"], changed["vae"]) == (keys["unet"], keys["vae"])
        before = changed["text_encoder"]
    encoder.write_text("{")
    assert part_keys(*described(copied))["text_encoder"] != before, "it is damaged"
    # Pipelines treat UNets of old versions otherwise.
    edit_json(copied / "unet" / "config.json", _diffusers_version="0.8.0")
    assert part_keys(*described(copied))["unet"] != keys["unet"]


def test_the_kind_of_pipeline_is_in_the_keys_of_what_depends_on_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    keys = part_keys(*described(tiny_folder))
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    edit_index(other, _class_name="StableDiffusionInpaintPipeline")
    changed = part_keys(*described(other))
    assert {part for part in keys if changed[part] != keys[part]} == {"unet"}
    # A pipeline of SDXL decodes in float32, whatever the model runs in.
    files, runtime = described(tiny_folder)
    upcast = part_keys(replace(files, family=StableDiffusionXL), runtime)
    assert upcast["vae"] != keys["vae"]
    assert upcast["text_encoder"] == keys["text_encoder"]


def test_only_a_quantised_component_has_the_quantisation_in_its_key(tiny_folder: Path) -> None:
    files, runtime = described(tiny_folder)
    keys = part_keys(files, runtime)
    for kind, packed in (
        (Quantization.FP8, {"unet"}),
        (Quantization.INT8, {"unet", "text_encoder"}),
    ):
        source = replace(files.source, quantize=Quantize(kind))
        changed = part_keys(
            replace(files, source=source), replace(runtime, quantization=kind.value)
        )
        assert {part for part in keys if changed[part] != keys[part]} == packed


def test_a_written_file_has_another_stamp(tiny_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_folder, tmp_path / "copied"))
    before = stamp_of(copied)
    assert stamp_of(copied) == before
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    alone = stamp_of(weights)
    new = weights.with_suffix(".new")
    new.write_bytes(weights.read_bytes())
    new.replace(weights)
    assert stamp_of(copied) != before
    assert stamp_of(weights) != alone
    with pytest.raises(OSError, match="gone"):
        stamp_of(tmp_path / "gone")
