"""Memory: measured at warm-up, used for the row limit, and for rejecting what never fits."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from darkroom_server.core.engine_config import Attention, EngineConfig
from darkroom_server.core.errors import Failure, Reason, StartupError, TooLarge
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.dispatch.admission.controller import check_fits
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.device import cgroup, memory
from darkroom_server.engine.device.memory import PeakMemory, available_bytes
from darkroom_server.engine.failures import DECODE_FAILED, OUT_OF_MEMORY
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup import placement
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.placement import denoiser_timer, measure_memory
from darkroom_server.engine.warmup.presets import resolve
from darkroom_server.engine.warmup.profiler import peak_bytes

from .conftest import LoopUnderTest, make_job

CPU = torch.device("cpu")
MIB = 1 << 20
NEEDS = MemoryNeeds(pixels=512 * 512, bytes_per_row=100, bytes_per_decode=150, available_bytes=1000)


@pytest.mark.parametrize(
    ("width", "height", "rows", "needed"),
    [
        (512, 512, 2, 200),  # The batch needs more than the decode.
        (512, 512, 1, 150),  # The decode needs more than the batch.
        (1024, 1024, 2, 800),
        (256, 512, 2, 100),
        (512, 512, 16, 1600),
    ],
)
def test_what_an_image_needs(width: int, height: int, rows: int, needed: int) -> None:
    assert NEEDS.needed(width, height, rows) == needed


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [(512, 512, 10), (256, 256, 40), (512, 1024, 5), (1024, 1024, 2), (2048, 2048, 2)],
)
def test_rows_that_fit(width: int, height: int, rows: int) -> None:
    assert NEEDS.rows_that_fit(width, height) == rows


SLICED = dataclasses.replace(NEEDS, bytes_per_pass=50, tile_pixels=384 * 384)


def test_slices_grow_by_the_square_and_tiles_do_not() -> None:
    assert SLICED.needed(512, 512, 2) == 250
    assert SLICED.needed(1024, 1024, 2) == 800 + 50 * 16
    assert SLICED.rows_that_fit(512, 512) == 8
    assert SLICED.rows_that_fit(1024, 512) == 3
    tiled = dataclasses.replace(SLICED, bytes_per_row=1, bytes_per_pass=0)
    assert tiled.needed(1024, 1024, 2) == 150
    assert tiled.needed(512, 512, 2) == 150
    assert tiled.needed(192, 384, 2) == 75, "half a tile"


def test_rows_that_fit_where_a_row_takes_nothing() -> None:
    needs = dataclasses.replace(NEEDS, bytes_per_row=0)
    assert needs.rows_that_fit(512, 512) == 1000


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_peak_is_what_was_allocated(kind: str) -> None:
    def work() -> None:
        if kind == "numpy":
            np.ones(64 * MIB, np.uint8)
        else:
            torch.ones(64 * MIB, dtype=torch.uint8)

    assert peak_bytes(CPU, work) == pytest.approx(64 * MIB, rel=0.2)
    # And again, though the C library may have kept the pages of the first time.
    assert peak_bytes(CPU, work) == pytest.approx(64 * MIB, rel=0.2)


def test_nothing_takes_next_to_nothing() -> None:
    assert peak_bytes(CPU, lambda: None) < 8 * MIB


def test_a_sandbox_that_cannot_reset_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", deny)
    monkeypatch.setattr(memory, "status_bytes", {"VmHWM": 700, "VmRSS": 500}.__getitem__)
    peak = PeakMemory(CPU)
    assert not peak.reset()
    assert not peak.exact
    monkeypatch.setattr(memory, "status_bytes", {"VmHWM": 900, "VmRSS": 500}.__getitem__)
    assert peak.read() == 200, "what goes beyond the highest mark so far"


@pytest.mark.parametrize(("below_limit", "available"), [(None, 900), (200, 180), (4700, 900)])
def test_some_memory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, below_limit: int | None, available: int
) -> None:
    monkeypatch.setattr(cgroup, "free_memory", lambda: below_limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes(CPU) == available


def family_with(unet: Any, *, vae_scale_factor: int = 8, prompt_tokens: int = 77) -> Family:
    """The family of a pipeline of which only the sizes and the denoiser are looked at."""
    tokenizer = SimpleNamespace(model_max_length=prompt_tokens)
    return StableDiffusion(
        SimpleNamespace(
            unet=unet, vae=object(), vae_scale_factor=vae_scale_factor, tokenizer=tokenizer
        )
    )


def test_a_batch_and_a_decode_are_measured() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32,),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=4,
        mid_block_type=None,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    runtime = resolve(EngineConfig(models=(), device="cpu"), StableDiffusion.half)
    memory_format = MemoryFormat(torch.float32, channels_last=False)
    decoder = Decoder(vae, lambda: runtime.precision(torch.float32))
    family = family_with(unet, vae_scale_factor=2, prompt_tokens=8)
    with torch.inference_mode():
        time_batch = denoiser_timer(family, memory_format, runtime)
        needs = measure_memory(time_batch, family, decoder, memory_format, runtime)
    assert needs.pixels == 128 * 128
    activation = 4 * 32 * 64 * 64  # Of one row: float32, channels, height, width.
    assert needs.bytes_per_row > activation
    assert needs.bytes_per_decode > 4 * 8 * 128 * 128
    assert needs.available_bytes > 0


@pytest.mark.parametrize("sliced", [False, True])
def test_memory_once_a_batch_is_distinguished_from_memory_of_each_row(
    sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = Attention.SLICED if sliced else Attention.SDPA
    runtime = resolve(
        EngineConfig(models=(), device="cpu", attention=attention), StableDiffusion.half
    )
    taken: list[int] = []
    monkeypatch.setattr(placement, "peak_bytes", lambda _, work: (work(), taken.pop())[1])
    decoder: Any = SimpleNamespace(decode_scaled=lambda *_: taken.append(7), tile_pixels=None)
    # On a CPU a row keeps its prompt's projections besides.
    unet: Any = SimpleNamespace(
        config=SimpleNamespace(sample_size=8, in_channels=4), device=torch.device("cuda")
    )

    def time_batch(rows: int) -> float:
        taken.append(1000 + 300 * rows)
        return 0.0

    needs = measure_memory(
        time_batch,
        family_with(unet),
        decoder,
        MemoryFormat(torch.float32, channels_last=False),
        runtime,
    )
    assert (needs.bytes_per_row, needs.bytes_per_pass) == ((300, 1000) if sliced else (800, 0))
    assert needs.bytes_per_decode == 7
    assert needs.needed(64, 64, 2) == 1600


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [(OUT_OF_MEMORY, MemoryError, "does not fit"), (DECODE_FAILED, StartupError, "cannot decode")],
)
def test_a_decode_that_fails_at_warm_up_is_an_error(
    failure: Failure, error: type[Exception], words: str
) -> None:
    runtime = resolve(EngineConfig(models=(), device="cpu"), StableDiffusion.half)
    decoder: Any = SimpleNamespace(decode_scaled=lambda *_: failure)
    unet: Any = SimpleNamespace(config=SimpleNamespace(sample_size=8, in_channels=4))
    memory_format = MemoryFormat(torch.float32, channels_last=False)
    with pytest.raises(error, match=words):
        placement.measure_decode(family_with(unet), decoder, memory_format, runtime)
    with pytest.raises(error, match=words):
        measure_memory(lambda _: 0.0, family_with(unet), decoder, memory_format, runtime)


def test_a_job_that_never_fits_is_rejected(shared_loop: LoopUnderTest) -> None:
    info = shared_loop.models["tiny"].info
    needs = MemoryNeeds(
        pixels=64 * 64, bytes_per_row=3 * MIB, bytes_per_decode=MIB, available_bytes=10 * MIB
    )
    info = dataclasses.replace(info, memory=needs)
    check_fits(make_job("fits"), info)
    with pytest.raises(TooLarge) as caught:
        check_fits(make_job("large", width=128, height=128), info)
    assert caught.value.reason is Reason.DOES_NOT_FIT
    assert caught.value.retry_after is None
    assert caught.value.metadata == {
        "needed_bytes": str(24 * MIB),
        "available_bytes": str(10 * MIB),
    }
    assert "24 MiB" in str(caught.value)
    assert "10 MiB" in str(caught.value)


def test_what_fits_bounds_a_batch(own_loop: LoopUnderTest) -> None:
    needs = MemoryNeeds(pixels=64 * 64, bytes_per_row=1, bytes_per_decode=1, available_bytes=4)
    own_loop.row_limits.memory = needs
    own_loop.row_limits.max_rows = 16
    own_loop.run(make_job("small", image_count=4), make_job("large", width=128, image_count=2))
    assert max(step.rows for step in own_loop.progress("small")) == 4
    assert max(step.rows for step in own_loop.progress("large")) == 2
