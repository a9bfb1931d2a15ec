"""Files of LoRA adapters: diffusers', kohya's and PEFT's layouts, and those that do not fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from bench.tiny_families.z_image import CASES as Z_IMAGE
from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.adapters.module import AdaptedModule, row_layers_of
from darkroom_server.engine.adapters.reading import (
    AdapterMismatch,
    parse_adapter,
    read_headers,
)
from darkroom_server.engine.adapters.sources import adapter_file
from darkroom_server.engine.adapters.weights import AdapterWeights

from .adapter_files import TARGETS, random_layers, write_adapter, write_kohya
from .tiny import write_tiny_model

peft = pytest.importorskip("peft")

DORA = "to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipeline(folder: Path) -> Iterator[Any]:
    """A pipeline of the test's own: adapters change its modules."""
    with torch.inference_mode():
        yield load(folder)


def load(folder: Path) -> Any:
    made = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in (made.unet, made.text_encoder):
        part.requires_grad_(False)
    return made


def read(file: Path, pipeline: Any) -> AdapterWeights:
    return parse_adapter(file.read_bytes(), file, "a", pipeline)


def unet_output(unet: Any, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return unet(  # type: ignore[no-any-return]
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.linspace(900, 50, rows),
        encoder_hidden_states=torch.randn(rows, 77, 16, generator=generator),
        return_dict=False,
    )[0]


def write_with_metadata(file: Path, pipeline: Any) -> None:
    """PEFT's configuration in the file: alpha is not the rank."""
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=list(TARGETS), alpha_pattern={"attn1.to_q": 3}
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    plain = {k: v for k, v in config.items() if isinstance(v, str | int | float | list | dict)}
    metadata = {f"unet.{name}": value for name, value in plain.items()}
    write_adapter(file, pipeline, encoders=False, metadata=metadata)


def write_dora(file: Path, pipeline: Any) -> None:
    """Layers whose rows have a length of their own."""
    state: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(9)
    for name, (down, up) in random_layers(pipeline.unet, (DORA,), 4, 3).items():
        state[f"unet.{name}.lora_A.weight"] = down
        state[f"unet.{name}.lora_B.weight"] = up
        outputs = up.shape[0]
        state[f"unet.{name}.lora_magnitude_vector"] = 1 + torch.rand(outputs, generator=generator)
    safetensors.torch.save_file(state, file)


LAYOUTS: dict[str, Callable[[Path, Any], object]] = {
    "diffusers": write_adapter,
    "kohya": write_kohya,
    "metadata": write_with_metadata,
    "dora": write_dora,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_as_diffusers_reads_it(
    layout: str, folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    LAYOUTS[layout](file, pipeline)
    reference = load(folder)
    reference.load_lora_weights(file, adapter_name="a")
    plain = unet_output(pipeline.unet)
    for scale in (1.0, 0.4):
        reference.set_adapters(["a"], [scale])
        wanted = unet_output(reference.unet)
        found = read(file, pipeline)
        adapted = AdaptedModule(pipeline.unet, slots=1, dtype=torch.float32)
        mix = (("a", scale),)
        with adapted.rows([mix, mix], {"a": found.components["unet"]}):
            output = unet_output(pipeline.unet)
        assert relative(output, wanted) < 1e-5
        assert relative(plain, wanted) > 1e-3
    if "text_encoder" in found.components:
        compare_encoders(pipeline, reference, found)


def compare_encoders(pipeline: Any, reference: Any, found: AdapterWeights) -> None:
    ids = pipeline.tokenizer("a red star", padding="max_length", return_tensors="pt").input_ids
    reference.set_adapters(["a"], [1.0])
    wanted = reference.text_encoder(ids)[0]
    plain = pipeline.text_encoder(ids)[0]
    adapted = AdaptedModule(pipeline.text_encoder, slots=1, dtype=torch.float32)
    with adapted.rows([(("a", 1.0),)], {"a": found.components["text_encoder"]}):
        assert relative(pipeline.text_encoder(ids)[0], wanted) < 1e-5
    assert relative(plain, wanted) > 1e-3


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_peft_folder_is_read_with_its_configuration(
    folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    reference = load(folder).unet
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "conv1"])
    model = peft.get_peft_model(reference, config)
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    model.eval().save_pretrained(tmp_path)
    file = adapter_file(AdapterSource(id="a", location=str(tmp_path)))
    assert file.name == "adapter_model.safetensors"
    layers = read(file, pipeline).components["unet"]
    adapted = AdaptedModule(pipeline.unet, slots=1, dtype=torch.float32)
    plain = unet_output(pipeline.unet)
    with adapted.rows([(("a", 1.0),)] * 2, {"a": layers}):
        output = unet_output(pipeline.unet)
    wanted = unet_output(reference)
    assert relative(output, wanted) < 1e-5
    assert relative(plain, wanted) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_have_the_shapes_of_the_weights(layout: str, pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    LAYOUTS[layout](file, pipeline)
    headers, whole = read_headers(file, "a", pipeline), read(file, pipeline)
    assert headers.rank == whole.rank == 4
    assert headers.bytes_as(torch.bfloat16) == whole.bytes_as(torch.bfloat16) > 0
    assert {c: layers.keys() for c, layers in headers.components.items()} == {
        c: layers.keys() for c, layers in whole.components.items()
    }
    downs = [layer.down for layers in headers.components.values() for layer in layers.values()]
    assert all(down.is_meta for down in downs)


def test_an_adapter_of_another_model_does_not_fit(pipeline: Any, tmp_path: Path) -> None:
    other = diffusers.StableDiffusionXLPipeline.from_pretrained(write_sdxl(tmp_path / "sdxl"))
    file = write_adapter(tmp_path / "other.safetensors", other)
    with pytest.raises(AdapterMismatch, match="unet"):
        read_headers(file, "a", pipeline)


def no_safetensors(file: Path) -> None:
    file.write_bytes(b"nothing that can be read")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_in_its_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def header_of_another_kind(file: Path) -> None:
    file.write_bytes((2).to_bytes(8, "little") + b"[]")


def damaged_configuration(file: Path) -> None:
    file.with_name("adapter_config.json").write_text('{"lora_alpha"')


def damaged_metadata(file: Path) -> None:
    header = {"lora_adapter_metadata": "{"}
    safetensors.torch.save_file(safetensors.torch.load(file.read_bytes()), file, header)


def no_lora(file: Path) -> None:
    safetensors.torch.save_file({"unet.conv_in.weight": torch.zeros(1)}, file)


def other_encoding(file: Path) -> None:
    state = {"lora_unet_x.lora_down.weight": torch.zeros(4, 4), "x.dora_scale": torch.zeros(1)}
    safetensors.torch.save_file(state, file)


@pytest.mark.parametrize(
    "spoil",
    [
        no_safetensors,
        cut_short,
        cut_in_its_header,
        header_of_another_kind,
        damaged_configuration,
        damaged_metadata,
        no_lora,
        other_encoding,
    ],
)
def test_another_kind_of_file_does_not_fit(
    spoil: Callable[[Path], None], pipeline: Any, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    write_kohya(file, pipeline)
    assert read_headers(file, "a", pipeline).rank == read(file, pipeline).rank
    spoil(file)
    with pytest.raises(AdapterMismatch):
        read_headers(file, "a", pipeline)
    with pytest.raises(AdapterMismatch):
        read(file, pipeline)


def test_a_folder_with_several_files_names_none(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(StartupError, match="has 2 "):
        adapter_file(AdapterSource(id="a", location=str(tmp_path)))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    found = adapter_file(AdapterSource(id="a", location=str(tmp_path)))
    assert found.name == "pytorch_lora_weights.safetensors"


def test_a_layer_over_the_tokens_of_all_rows_is_not_a_row_layer(tmp_path: Path) -> None:
    """Z-Image embeds the tokens of all images in one call of a linear layer."""
    case = Z_IMAGE[0]
    transformer = diffusers.DiffusionPipeline.from_pretrained(case.write(tmp_path)).transformer
    generator = torch.Generator().manual_seed(0)
    width = transformer.config.cap_feat_dim

    def call(rows: int) -> None:
        images = [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(rows)]
        prompts = [torch.randn(5, width, generator=generator) for _ in range(rows)]
        transformer(images, torch.linspace(0.1, 0.9, rows), prompts)

    names = {n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.inference_mode():
        found = row_layers_of(transformer, call, names)
    embedders = {name for name in names if "all_x_embedder" in name}
    assert embedders
    assert not embedders & found
    assert any(name.endswith("to_q") for name in found)


def test_an_adapter_that_cannot_share_says_why(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "dora.safetensors"
    write_dora(file, pipeline)
    layers = read(file, pipeline).components["unet"]
    every = [name for name, _ in pipeline.unet.named_modules()]
    adapted = AdaptedModule(pipeline.unet, slots=1, dtype=torch.float32, row_layers=every)
    assert "DoRA" in adapted.unshareable(layers)
    plain = {name: layer for name, layer in layers.items() if "nothing" in name}
    assert adapted.unshareable(plain) == ""
