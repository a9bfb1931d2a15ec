"""The memory layout of the VAE: its rule, and diffusers' own pictures in that layout."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from bench.tiny_families.flux import write_dev
from bench.tiny_families.qwen_image import write_qwen_image
from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.engine.catalogue.meta_pipeline import meta_pipeline
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.loading.pipeline import find_model
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.warmup.formats import Hardware, vae_channels_last
from darkroom_server.engine.warmup.placement import vae_is_channels_last
from darkroom_server.engine.warmup.presets import resolve

from .conftest import LoopUnderTest, config_for, make_job
from .fake_cuda import FakeDevice
from .test_formats import AMX, OLD, ZEN4

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("preset", "hardware", "dtype", "denoiser", "channels_last"),
    [
        (Preset.FAST, Hardware(ZEN4), BFLOAT16, False, True),
        (Preset.MAX, Hardware(ZEN4), BFLOAT16, False, True),
        (Preset.FAST, Hardware(ZEN4), FLOAT32, False, False),
        (Preset.FRUGAL, Hardware(ZEN4), BFLOAT16, False, False),
        (Preset.TINY, Hardware(ZEN4), BFLOAT16, False, False),
        (Preset.FAST, Hardware(AMX), BFLOAT16, True, True),
        (Preset.FAST, Hardware(OLD), BFLOAT16, False, False),
        (Preset.FAST, Hardware(capability=(9, 0)), torch.float16, True, True),
        (Preset.FAST, Hardware(capability=(6, 1)), torch.float16, False, False),
        (Preset.FRUGAL, Hardware(capability=(9, 0)), BFLOAT16, False, False),
    ],
)
def test_the_rule(
    preset: Preset, hardware: Hardware, dtype: torch.dtype, denoiser: bool, channels_last: bool
) -> None:
    assert vae_channels_last(preset, hardware, dtype, denoiser) is channels_last


@pytest.fixture
def zen4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX-512 BF16 and without AMX."""
    monkeypatch.setattr(Hardware, "of", lambda _: Hardware(ZEN4))


def chosen(folder: Path, **fields: Any) -> tuple[bool, bool]:
    """Whether the denoiser of ``folder`` is channels last, and whether its VAE is."""
    config = EngineConfig(models=(), **{"device": "cpu", **fields})
    files = find_model(ModelSource(id="tiny", location=str(folder)), safety_checker=False)
    family = family_of(meta_pipeline(files))
    runtime = resolve(config, files.family.half)
    return runtime.channels_last and family.convolutional, vae_is_channels_last(family, runtime)


@pytest.mark.usefixtures("zen4")
def test_what_is_configured_is_in_force_for_both(tiny_folder: Path) -> None:
    assert chosen(tiny_folder) == (False, True)
    for configured in (False, True):
        assert chosen(tiny_folder, channels_last=configured) == (configured, configured)
    assert chosen(tiny_folder, dtype=Dtype.FLOAT32) == (False, False), "the dtype in force decides"


@pytest.mark.usefixtures("zen4")
def test_the_rule_is_for_the_vaes_that_were_measured(tmp_path: Path) -> None:
    # A transformer has nothing to store channels last, and its VAE is the usual one.
    flux = write_dev(tmp_path / "flux")
    assert chosen(flux) == (False, True)
    assert chosen(flux, channels_last=True) == (False, True)
    # One for videos: torch cannot store its five dimensions channels last.
    assert chosen(write_qwen_image(tmp_path / "qwen"), channels_last=True) == (False, False)


@pytest.mark.usefixtures("zen4")
def test_a_picture_is_that_of_diffusers_with_such_a_vae(tiny_folder: Path) -> None:
    config = config_for(tiny_folder, dtype=Dtype.BFLOAT16, channels_last=None, preset=Preset.FAST)
    job = make_job("one", exact=True)
    loop = LoopUnderTest(config)
    try:
        loop.run(job)
        model = loop.models["tiny"]
        runtime = model.info.runtime
        denoiser, vae = model.unet.conv_in.weight, model.decoder._vae.decoder.conv_in.weight
    finally:
        loop.close()
    assert (runtime.channels_last, runtime.vae_channels_last) == (False, True)
    assert denoiser.is_contiguous()
    assert vae.is_contiguous(memory_format=torch.channels_last)
    assert not vae.is_contiguous()
    data = loop.image(job.id).image.data
    found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
    pictures = {layout: picture_of_diffusers(tiny_folder, job, layout) for layout in LAYOUTS}
    assert np.array_equal(found, pictures[torch.channels_last])
    assert not np.array_equal(found, pictures[torch.contiguous_format]), "the layout shows"


def picture_of_diffusers(folder: Path, job: Any, layout: torch.memory_format) -> Any:
    """The picture of ``job`` by diffusers' own pipeline, whose VAE is in ``layout``."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(memory_format=layout)
    (image,) = pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed_of(0)),
    ).images
    return np.asarray(image)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("preset", [Preset.FAST, Preset.FRUGAL])
def test_on_a_gpu_the_vae_has_the_layout_of_the_denoiser(
    preset: Preset, tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    layouts = []
    for folder in (tiny_folder, write_dev(tmp_path / "flux")):
        source = ModelSource(id="tiny", location=str(folder))
        config = EngineConfig(models=(source,), device="cuda", preset=preset, rows=2)
        _, ready = start_loop(config, lambda _: None)
        runtime = ready.models[0].runtime
        layouts.append((runtime.channels_last, runtime.vae_channels_last))
    fast = preset is Preset.FAST
    assert layouts == [(fast, fast), (False, False)]
