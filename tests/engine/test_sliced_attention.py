"""Sliced attention on a GPU: finer slices for larger images, then SDPA, and both are said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import Event, ImageReady, JobFailed
from darkroom_server.core.job import Job
from darkroom_server.core.model import MemoryNeeds, ModelInfo, heads_of_slice
from darkroom_server.engine.failures import OUT_OF_MEMORY
from darkroom_server.engine.families.stable_diffusion import StableDiffusionModel
from darkroom_server.engine.warmup.formats import HalfPrecision
from darkroom_server.engine.warmup.measurement import slices_get_finer
from darkroom_server.engine.warmup.presets import resolve

from .conftest import make_job
from .fake_cuda import FakeDevice
from .test_gpu_path import on_gpu
from .test_gpu_waits import Served

NEEDS = MemoryNeeds(
    pixels=512 * 512,
    bytes_per_row=65,
    bytes_per_pass=320,
    bytes_per_decode=400,
    available_bytes=2000,
    heads_per_slice=4,
    sdpa_bytes_per_row=65,
)


@pytest.mark.parametrize(
    ("scale", "heads"), [(0.25, 4), (1.0, 4), (1.2, 2), (1.5, 1), (2.0, 1), (16.0, 1)]
)
def test_a_slice_of_a_larger_image_has_fewer_heads(scale: float, heads: int) -> None:
    assert heads_of_slice(4, scale) == heads


def test_finer_slices_need_less_memory() -> None:
    coarse = replace(NEEDS, heads_per_slice=0, sdpa_bytes_per_row=0)
    assert coarse.needed(512, 512, 2) == NEEDS.needed(512, 512, 2) == 450
    assert coarse.needed(1024, 1024, 2) == 520 + 16 * 320
    assert NEEDS.needed(1024, 1024, 2) == 520 + 16 * 320 // 4
    assert not NEEDS.uses_sdpa(1024, 1024)


def test_what_no_slice_fits_runs_with_sdpa() -> None:
    tight = replace(NEEDS, available_bytes=1700)
    assert tight.uses_sdpa(1024, 1024)
    assert not tight.uses_sdpa(768, 768)
    assert tight.needed(1024, 1024, 2) == max(520, 4 * tight.bytes_per_decode)
    assert tight.rows_that_fit(1024, 1024) == 1700 // 260
    assert not replace(tight, sdpa_bytes_per_row=0).uses_sdpa(1024, 1024), "it cannot be chosen"
    assert not replace(tight, sdpa_bytes_per_row=900).uses_sdpa(1024, 1024), "it needs more"


def test_get_model_says_from_which_size_on(cuda: FakeDevice, tiny_folder: Path) -> None:
    info: ModelInfo = Served(tiny_folder, Preset.FRUGAL).models["tiny"].info
    assert info.memory.heads_per_slice == 2
    assert info.memory.sdpa_bytes_per_row > 0
    assert info.preset_rule == info.runtime.preset_rule == ""
    short = replace(info, memory=short_memory(info.memory))
    assert short.preset_rule.startswith("attention is sdpa from 120×120 on: ")


def short_memory(needs: MemoryNeeds) -> MemoryNeeds:
    """Memory in which two rows of 64 × 64 fit with slices, and those of 120 × 120 without only."""
    return replace(
        needs, bytes_per_row=10, bytes_per_pass=100, sdpa_bytes_per_row=10, available_bytes=650
    )


def test_batches_of_a_large_size_run_with_sdpa_and_say_so(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(tiny_folder, Preset.FRUGAL)
    model = served.models["tiny"]
    model.info = replace(model.info, memory=short_memory(model.info.memory))
    used: dict[int, set[str]] = {}
    emit = served.emit
    events: list[Event] = []

    def kept(event: Event) -> None:
        events.append(event)
        emit(event)

    for kind in (AttnProcessor2_0, SlicedAttnProcessor):
        monkeypatch.setattr(kind, "__call__", noting(kind, used))
    monkeypatch.setattr(served, "emit", kept)
    with structlog.testing.capture_logs() as lines:
        served.run(job("small", 64), job("larger", 96), job("large", 128), job("larger still", 128))
    images = [event for event in events if isinstance(event, ImageReady)]
    fallbacks = {event.job_id: event.image.replay.memory_fallbacks for event in images}
    assert fallbacks == {
        "small": (),
        "larger": (),
        "large": ("sdpa",),
        "larger still": ("sdpa",),
    }
    # By the pixels of the latents at which the tiny UNet attends: a sixteenth of the image's side.
    assert used == {4 * 4: {"sliced 2"}, 6 * 6: {"sliced 1"}, 8 * 8: {"sdpa"}}
    warned = [line for line in lines if line["event"].startswith("attention is sdpa")]
    assert [(line["width"], line["log_level"]) for line in warned] == [(128, "warning")]


def job(id: str, side: int) -> Job:
    return make_job(id, width=side, height=side, steps=2)


def noting(kind: Any, used: dict[int, set[str]]) -> Any:
    call = kind.__call__

    def noted(self: Any, attn: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        name = "sdpa" if kind is AttnProcessor2_0 else f"sliced {self.slice_size}"
        if hidden.ndim == 3:  # The VAE's attention, which is never sliced, takes images.
            used.setdefault(hidden.shape[1], set()).add(name)
        return call(self, attn, hidden, *args, **kwargs)

    return noted


@pytest.mark.parametrize("preset", [Preset.FRUGAL, Preset.FAST])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cpu_keeps_its_slices(preset: Preset, device: str, cuda: FakeDevice) -> None:
    config = on_gpu(Path(), preset, device=device)
    runtime = resolve(config, HalfPrecision())
    assert slices_get_finer(runtime) is (device == "cuda" and preset is Preset.FRUGAL)


@pytest.mark.parametrize("saves", [True, False])
def test_a_batch_without_memory_runs_again_with_sdpa(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    served = Served(tiny_folder, Preset.FRUGAL)
    model = served.models["tiny"]
    needs = replace(short_memory(model.info.memory), available_bytes=10**9)
    sdpa = needs.sdpa_bytes_per_row if saves else 10**6
    model.info = replace(model.info, memory=replace(needs, sdpa_bytes_per_row=sdpa))
    denoise = StableDiffusionModel.denoise
    tries: list[bool] = []
    events: list[Event] = []

    def without_memory(self: Any, samples: Any) -> Any:
        sliced = any(isinstance(p, SlicedAttnProcessor) for p in self.unet.attn_processors.values())
        tries.append(sliced)
        if sliced:
            raise torch.OutOfMemoryError("no memory for slices")
        return denoise(self, samples)

    def kept(event: Event) -> None:
        events.append(event)
        if isinstance(event, JobFailed):
            served.loop.close()
        else:
            emit(event)

    emit = served.emit
    monkeypatch.setattr(StableDiffusionModel, "denoise", without_memory)
    monkeypatch.setattr(served, "emit", kept)
    with structlog.testing.capture_logs() as lines:
        served.run(job("one", 64))
    images = [event for event in events if isinstance(event, ImageReady)]
    warned = [line for line in lines if line["event"].startswith("attention is sdpa")]
    if saves:
        assert [image.image.replay.memory_fallbacks for image in images] == [("sdpa",)]
        assert tries == [True, False, False], "the second step begins with SDPA"
        assert len(warned) == 1
    else:
        (failed,) = [event for event in events if isinstance(event, JobFailed)]
        assert failed.failure is OUT_OF_MEMORY
        assert (tries, warned) == ([True], [])
