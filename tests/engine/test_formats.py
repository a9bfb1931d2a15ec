"""The rule for dtype and layout: from the machine's features, never from a clock."""

from pathlib import Path

import pytest
import structlog
import torch

from darkroom_server.core.engine_config import Dtype, EngineConfig, Preset
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup import formats
from darkroom_server.engine.warmup.formats import Hardware, format_rule, vae_channels_last
from darkroom_server.engine.warmup.presets import resolve

from .conftest import LoopUnderTest, config_for

AMX = frozenset({"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"})
ZEN4 = frozenset({"avx2", "avx512f", "avx512_bf16"})
OLD = frozenset({"avx2", "avx512f"})


@pytest.mark.parametrize(
    ("preset", "hardware", "dtype", "channels_last", "reason"),
    [
        (Preset.FAST, Hardware(AMX), torch.bfloat16, True, "amx_bf16"),
        (Preset.FAST, Hardware(ZEN4), torch.bfloat16, False, "avx512_bf16"),
        (Preset.FAST, Hardware(OLD), torch.float32, False, "no bfloat16 instructions"),
        (Preset.FRUGAL, Hardware(OLD), torch.bfloat16, False, "saves memory"),
        (Preset.TINY, Hardware(AMX), torch.bfloat16, False, "saves memory"),
        (Preset.FAST, Hardware(capability=(9, 0)), torch.float16, True, "with tensor cores"),
        (Preset.FAST, Hardware(capability=(6, 1)), torch.float16, False, "without tensor cores"),
        (Preset.FRUGAL, Hardware(capability=(9, 0)), torch.float16, False, "preset frugal"),
    ],
)
def test_the_rule(
    preset: Preset, hardware: Hardware, dtype: torch.dtype, channels_last: bool, reason: str
) -> None:
    rule = format_rule(preset, hardware, StableDiffusion.half)
    assert (rule.dtype, rule.channels_last) == (dtype, channels_last)
    assert reason in rule.reason


@pytest.mark.parametrize(
    ("capability", "flags"),
    [("AVX512", {"avx2", "avx512_bf16", "amx_bf16"}), ("AVX2", {"avx2"}), ("DEFAULT", {"avx2"})],
)
def test_the_flags_are_those_that_torch_may_use(
    capability: str, flags: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: avx2 avx512_bf16 amx_bf16\n\n"
        "processor\t: 1\nflags\t\t: none\n"
    )
    monkeypatch.setattr(formats, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert Hardware.of(torch.device("cpu")) == Hardware(frozenset(flags))
    assert formats.cpu_name() == "A CPU"


def test_a_system_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CPUINFO", tmp_path / "missing")
    assert Hardware.of(torch.device("cpu")) == Hardware()
    assert formats.cpu_name() == ""


def test_two_starts_choose_the_same_and_log_the_rule(tiny_folder: Path) -> None:
    config = config_for(tiny_folder, dtype=Dtype.AUTO, channels_last=None, rows=2)
    hardware = Hardware.of(torch.device("cpu"))
    wanted = format_rule(Preset.FAST, hardware, StableDiffusion.half)
    vae = vae_channels_last(Preset.FAST, hardware, wanted.dtype, wanted.channels_last)
    for _ in range(2):
        with structlog.testing.capture_logs() as logs:
            loop = LoopUnderTest(config)
        loop.close()
        runtime = loop.models["tiny"].info.runtime
        assert (runtime.dtype, runtime.channels_last, runtime.format_rule) == (
            str(wanted.dtype).removeprefix("torch."),
            wanted.channels_last,
            wanted.reason,
        )
        assert runtime.vae_channels_last is vae
        (loaded,) = (log for log in logs if log["event"] == "model loaded")
        assert loaded["format_rule"] == wanted.reason
        assert loaded["vae_channels_last"] is vae


def test_no_rule_is_reported_for_what_is_configured() -> None:
    config = EngineConfig(models=(), device="cpu", dtype=Dtype.FLOAT32, channels_last=False)
    assert resolve(config, StableDiffusion.half).format_rule == ""


def test_measurements_use_random_values() -> None:
    """Zeros can be faster than the values of real batches."""
    from types import SimpleNamespace

    family = StableDiffusion(
        SimpleNamespace(
            unet=SimpleNamespace(
                config=SimpleNamespace(sample_size=8, in_channels=4, cross_attention_dim=16)
            ),
            tokenizer=SimpleNamespace(model_max_length=77),
            vae_scale_factor=8,
        )
    )
    inputs = family.denoiser_inputs(2, torch.float32, torch.device("cpu"), torch.contiguous_format)
    for name in ("sample", "encoder_hidden_states"):
        assert inputs[name].shape[0] == 2
        assert 0.8 < inputs[name].std() < 1.2
    assert inputs["timestep"].min() > 0
