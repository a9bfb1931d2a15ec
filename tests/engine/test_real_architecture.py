"""Stable Diffusion 1.4's own architecture, on a CPU, under the preset that saves memory."""

import time
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from darkroom_server.core.engine_config import EngineConfig, ModelSource, Preset
from darkroom_server.core.events import Event, ImageReady, JobFailed, JobFinished
from darkroom_server.engine.loading.startup import start_loop

from .conftest import make_job
from .real import write_real_model

MAX_BATCHES = 4
"""Of the denoiser at start, each of seconds on a CPU: the memory, two readings and a warm-up."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_loads_and_takes_a_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_real_model()
    batches: list[int] = []
    forward = UNet2DConditionModel.forward

    def counted(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, JobFinished | JobFailed):
            loop.close()

    began = time.monotonic()
    loop, ready = start_loop(
        EngineConfig(
            models=(ModelSource(id="sd14", location=str(folder)),),
            device="cpu",
            preset=Preset.FRUGAL,
        ),
        emit,
    )
    started = time.monotonic() - began
    assert len(batches) <= MAX_BATCHES, batches
    loop.submit(make_job("real", model="sd14", width=256, height=256, steps=1))
    loop.run()
    generated = time.monotonic() - began - started
    with capsys.disabled():
        print(f"start {started:.1f} s, image {generated:.1f} s, {ready.models[0].memory}")
    (image,) = (event.image for event in events if isinstance(event, ImageReady))
    assert len(image.data) == 256 * 256 * 3
    info = ready.models[0]
    assert (info.defaults.width, info.runtime.dtype) == (512, "bfloat16")
    assert info.memory.bytes_per_row > 16 << 20
    assert info.memory.bytes_per_decode > 16 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("preset", [Preset.FRUGAL, Preset.FAST, Preset.TINY])
def test_it_runs_whole_on_a_gpu(preset: Preset) -> None:
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, JobFinished | JobFailed):
            loop.close()

    source = ModelSource(id="sd14", location=str(write_real_model()))
    loop, _ = start_loop(EngineConfig(models=(source,), device="cuda", preset=preset), emit)
    loop.submit(make_job("whole", model="sd14", width=512, height=512, steps=20))
    loop.run()
    (image,) = (event.image for event in events if isinstance(event, ImageReady))
    assert len(image.data) == 512 * 512 * 3
    assert len(set(image.data)) > 8, "no flat picture"
