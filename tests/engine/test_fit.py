"""A model that is too large is rejected before its weights are read."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.device import cgroup
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.loading import pipeline, read_model
from darkroom_server.engine.loading.fit import weight_bytes
from darkroom_server.engine.loading.pipeline import ModelFiles, find_model, weights_of
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.warmup.presets import Runtime, resolve

from .conftest import config_for

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def files_of(folder: Path) -> ModelFiles:
    return find_model(ModelSource(id="tiny", location=str(folder)), safety_checker=False)


def runtime_of(files: ModelFiles, dtype: Dtype = Dtype.FLOAT32, **changes: Any) -> Runtime:
    config = EngineConfig(models=(), device="cpu", dtype=dtype, preset=Preset.FAST)
    return replace(resolve(config, files.family.half), **changes)


def limit_memory(patch: pytest.MonkeyPatch, free: int) -> None:
    patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    patch.setattr(cgroup, "free_memory", lambda: None)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_the_headers_say_what_the_loaded_weights_take(dtype: Dtype, tiny_folder: Path) -> None:
    files = files_of(tiny_folder)
    runtime = runtime_of(files, dtype)
    family = family_of(pipeline.load_pipeline(files, runtime.dtype))
    parameters = sum(
        p.numel() * p.element_size()
        for name in family.components
        for p in getattr(family.pipeline, name).parameters()
    )
    found = weight_bytes(files, runtime)
    assert parameters <= found <= sum(weights_of(family).values())


def test_a_second_variant_is_not_counted_twice(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    usual = weight_bytes(files_of(folder), runtime_of(files_of(folder)))
    weights = load_file(folder / UNET)
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, folder / UNET.with_suffix(".fp16.safetensors"))
    assert weight_bytes(files_of(folder), runtime_of(files_of(folder))) == usual
    # Shards share the names out, so each counts.
    (folder / UNET).unlink()
    (folder / UNET.with_suffix(".fp16.safetensors")).unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        shard = {name: weights[name] for name in part}
        save_file(
            shard, folder / "unet" / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        )
    assert weight_bytes(files_of(folder), runtime_of(files_of(folder))) == usual


def test_eight_bits_are_a_byte_for_each_weight_of_the_denoiser(tiny_folder: Path) -> None:
    files = files_of(tiny_folder)
    sizes = [
        weight_bytes(files, runtime_of(files, Dtype.BFLOAT16, fp8_storage=stored))
        for stored in (False, True)
    ]
    unet = sum(weight.numel() for weight in load_file(tiny_folder / UNET).values())
    assert sizes[0] - sizes[1] == unet


def test_a_single_file_without_its_averaged_weights(tiny_folder: Path, tmp_path: Path) -> None:
    weights = {
        "model.diffusion_model.a": torch.zeros(8, 4, dtype=torch.float16),
        "cond_stage_model.position_ids": torch.zeros(1, 7, dtype=torch.int64),
        "first_stage_model.a": torch.zeros(3, dtype=torch.float16),
        "model_ema.a": torch.zeros(1000),
    }
    file = tmp_path / "one.safetensors"
    save_file(weights, file)
    source = ModelSource(id="one", location=str(file), config=str(tiny_folder))
    files = find_model(source, safety_checker=False)
    assert weight_bytes(files, runtime_of(files)) == (8 * 4 + 3) * 4 + 7 * 8
    assert weight_bytes(files, runtime_of(files, Dtype.BFLOAT16)) == (8 * 4 + 3) * 2 + 7 * 8


def test_a_model_that_is_too_large_is_not_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(tiny_folder)
    needed = weight_bytes(files, runtime_of(files))

    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(read_model, "load_pipeline", read)
    # A tenth is kept free.
    limit_memory(monkeypatch, needed)
    with pytest.raises(StartupError) as caught:
        start_loop(config_for(tiny_folder), lambda _: None)
    available = int(needed * 0.9)
    assert f"its weights need {needed} bytes in float32, and {available} bytes are" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    limit_memory(monkeypatch, int(needed / 0.9) + 2)
    with pytest.raises(AssertionError, match="were read"):
        start_loop(config_for(tiny_folder), lambda _: None)


SERVE = """
import sys
from types import SimpleNamespace
import psutil
from darkroom_server import cli
from darkroom_server.engine.device import cgroup
psutil.virtual_memory = lambda: SimpleNamespace(available=10**6)
cgroup.free_memory = lambda: None
cli.main(["serve", "--port", "0", "--metrics-port", "0", "--engine", "thread", *sys.argv[1:]])
"""


def test_the_server_ends_with_code_2(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", SERVE, "--device", "cpu", "--dtype", "float32"]
    result = subprocess.run(
        [*command, "--model", str(tiny_folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    files = files_of(tiny_folder)
    needed = weight_bytes(files, runtime_of(files))
    assert f"weights need {needed} bytes in float32, and 900000 bytes are available" in line
