"""What the knobs mean: the presets' table of docs/models.md, and each knob alone."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import Attention, Compile, Dtype, EngineConfig, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.device import cgroup
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup import presets
from darkroom_server.engine.warmup.formats import (
    HalfPrecision,
    Hardware,
    format_rule,
    vae_channels_last,
)
from darkroom_server.engine.warmup.presets import Runtime, allowed_threads, resolve

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PRESETS = (Preset.FRUGAL, Preset.FAST, Preset.MAX, Preset.TINY)


COMPILES = {
    Compile.OFF: "no",
    Compile.CACHED: "if it is on disk",
    Compile.BACKGROUND: "yes, in the background",
}


def runtime(half: HalfPrecision = StableDiffusion.half, **fields: Any) -> Runtime:
    return resolve(EngineConfig(models=(), **fields), half)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def in_words(preset: Preset) -> dict[str, str]:
    """A column of the page's table, made from what the code says."""
    gpu, cpu = (runtime(preset=preset, device=device) for device in ("cuda", "cpu"))
    cpus = {
        "none": Hardware(),
        "bf16": Hardware(frozenset({"avx512_bf16"})),
        "amx": Hardware(frozenset({"avx512_bf16", "amx_bf16"})),
    }
    rules = {
        name: format_rule(preset, hardware, StableDiffusion.half) for name, hardware in cpus.items()
    }
    vaes = (
        vae_channels_last(preset, cpus[name], rule.dtype, rule.channels_last)
        for name, rule in rules.items()
    )
    dtypes = {name: str(rule.dtype).removeprefix("torch.") for name, rule in rules.items()}
    layouts = (gpu.channels_last, *(rule.channels_last for rule in rules.values()))
    formats: dict[tuple[bool, ...], str] = {
        (False, False, False, False): "contiguous",
        (True, False, False, True): "channels last (on a CPU: if it has AMX)",
        (True, False, True, True): "channels last (on a CPU: if it has AVX-512 BF16 or AMX)",
    }
    assert (gpu.attention, gpu.slice_size, gpu.autocast, gpu.vae_tiling) == (
        (cpu.attention, cpu.slice_size, cpu.autocast, cpu.vae_tiling)
    ), "one row has both"
    assert not cpu.fp8_storage
    return {
        "weights on a GPU": str(gpu.dtype).removeprefix("torch.")
        + ", the denoiser's stored in 8 bits" * gpu.fp8_storage,
        "weights on a CPU": dtypes["none"]
        if len(set(dtypes.values())) == 1
        else f"{dtypes['bf16']} if it has AVX-512 BF16 or AMX, else {dtypes['none']}",
        "attention": "SDPA" if cpu.slice_size == "" else f"sliced (`{cpu.slice_size}`)",
        "autocast": "yes" if cpu.autocast else "no",
        "memory format": formats[layouts],
        "memory format of the VAE": formats[gpu.vae_channels_last, *vaes],
        "VAE": "tiled" if cpu.vae_tiling else "whole",
        "compiled denoiser, on a CPU": COMPILES[cpu.compile],
        "graphs, on a GPU": "yes, compiled in the background"
        if gpu.graphs and gpu.compile is Compile.BACKGROUND
        else "no",
    }


@pytest.mark.usefixtures("gpus")
def test_the_page_has_the_presets_table() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[0] == "" and "`frugal`" in row)
    assert rows[start][1:] == [f"`{preset}`" for preset in PRESETS]
    table = {row[0]: row[1:] for row in rows[start + 1 :] if len(row) == 5}
    columns = [in_words(preset) for preset in PRESETS]
    for name in columns[0]:
        assert table[name] == [column[name] for column in columns]


@pytest.mark.usefixtures("gpus")
def test_defaults_with_a_gpu() -> None:
    assert (runtime().preset, runtime().device) == (Preset.FRUGAL, torch.device("cuda:0"))
    assert runtime(device="cuda:1").device == torch.device("cuda:1")
    assert runtime(device="cpu").preset is Preset.FAST


@pytest.mark.usefixtures("no_gpu")
def test_defaults_without_a_gpu() -> None:
    assert (runtime().preset, runtime().device) == (Preset.FAST, torch.device("cpu"))


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_torch_does_not_find_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "GPU_NODES", ("no-such-node",))
    assert runtime().preset_rule == "the default on a CPU"
    monkeypatch.setattr(presets, "GPU_NODES", ("no-such-node", "null"))
    assert runtime().preset_rule.startswith("/dev/null is a GPU, and the models run on the CPU: ")
    assert runtime(device="cpu").preset_rule == "the default on a CPU"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("knob", "value", "field", "wanted"),
    [
        ("dtype", Dtype.FLOAT32, "dtype", torch.float32),
        ("dtype", Dtype.BFLOAT16, "dtype", torch.bfloat16),
        ("attention", Attention.SDPA, "attention", Attention.SDPA),
        ("attention", Attention.SLICED, "attention", Attention.SLICED),
        ("autocast", True, "autocast", True),
        ("autocast", False, "autocast", False),
        ("vae_tiling", True, "vae_tiling", True),
        ("vae_tiling", False, "vae_tiling", False),
        ("channels_last", True, "channels_last", True),
        ("channels_last", False, "channels_last", False),
        ("compile", Compile.BLOCKING, "compile", Compile.BLOCKING),
    ],
)
def test_a_knob_wins(preset: Preset, knob: str, value: Any, field: str, wanted: Any) -> None:
    plain, turned = (runtime(preset=preset, device="cpu", **k) for k in ({}, {knob: value}))
    assert getattr(turned, field) == wanted
    others = {field, "slice_size", "format_rule"}
    if knob in ("dtype", "channels_last"):
        others.add("vae_channels_last")  # It follows from them.
    for other in dataclasses.fields(Runtime):
        if other.name not in others:
            assert getattr(turned, other.name) == getattr(plain, other.name)


@pytest.mark.parametrize("size", ["auto", "max", "1", "12"])
def test_slice_sizes(size: str) -> None:
    assert runtime(preset=Preset.FRUGAL, device="cpu", slice_size=size).slice_size == size


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"device": "cpu", "dtype": Dtype.FLOAT16}, "use --dtype bfloat16"),
        ({"device": "gpu"}, "use auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "use auto, cpu, cuda or cuda:N"),
        ({"device": ""}, "use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:-1"}, "use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99999"}, "torch sees 0 CUDA devices"),
        ({"device": "cuda:3"}, "torch sees 0 CUDA devices"),
        ({"device": "cuda"}, "torch sees 0 CUDA devices"),
        ({"device": "cpu", "slice_size": "2"}, "goes with --attention sliced"),
        *(
            ({"device": "cpu", "preset": Preset.FRUGAL, "slice_size": size}, "a positive number")
            for size in ("0", "-1", "half", "²")
        ),
    ],
)
def test_what_means_nothing_here(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(StartupError, match=line) as caught:
        runtime(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [(None, 4), (2.5, 2), (0.5, 1), (9.0, 4)],
)
def test_threads_are_as_many_as_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5})
    monkeypatch.setattr(cgroup, "cores", lambda: quota)
    assert allowed_threads() == threads
