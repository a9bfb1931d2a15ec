"""Kernels and live bytes of a batch of the real UNets, counted on shapes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from darkroom_server.core.engine_config import Preset

from . import architectures
from .fake_cuda import CudaTensor, FakeDevice, fake_cuda

MIB = 1 << 20
HALF = torch.float16


def sd14_unet() -> Any:
    """The UNet of CompVis/stable-diffusion-v1-4."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def device() -> Iterator[FakeDevice]:
    with fake_cuda(on_meta=True) as made, torch.inference_mode():
        yield made


@pytest.fixture(scope="module")
def on_device(device: FakeDevice) -> Callable[[Any], Any]:
    """Makes a model in half precision on the device, once."""
    made: dict[Any, Any] = {}

    def model(make: Callable[[], Any]) -> Any:
        if make not in made:
            with torch.device("meta"):
                module = make().half().eval()
            made[make] = module.to("cuda")
        return made[make]

    return model


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return CudaTensor(torch.empty(shape, dtype=dtype, device="meta"))


def counted(device: FakeDevice, unet: Any, preset: Preset, rows: int, size: int) -> tuple[int, int]:
    """Kernels, and bytes besides the weights, of a batch as ``preset`` runs it."""
    if preset is Preset.FAST:
        unet.set_attn_processor(AttnProcessor2_0())
    else:
        unet.set_attention_slice("auto" if preset is Preset.FRUGAL else "max")
    inputs: dict[str, Any] = {
        "sample": random(rows, 4, size // 8, size // 8),
        "timestep": random(rows, dtype=torch.float32),
        "encoder_hidden_states": random(rows, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": random(rows, 1280),
            "time_ids": random(rows, 6),
        }
    device.reset_counts()
    torch.cuda.reset_peak_memory_stats()
    before = device.live_bytes
    casts = torch.autocast("cuda", HALF) if preset is Preset.FRUGAL else nullcontext()
    with casts:
        unet(**inputs, return_dict=False)
    return sum(device.kernels.values()), device.peak_bytes - before


@pytest.mark.parametrize(
    ("make", "preset", "rows", "size", "kernels", "mib"),
    [
        (sd14_unet, Preset.FAST, 2, 512, 979, 130.1),
        (sd14_unet, Preset.FAST, 32, 512, 979, 2081),
        (sd14_unet, Preset.FAST, 2, 1024, 979, 520.1),
        (sd14_unet, Preset.FRUGAL, 2, 512, 2183, 450.4),
        (sd14_unet, Preset.TINY, 2, 512, 3123, 130.1),
        (architectures.sdxl_unet, Preset.FRUGAL, 2, 1024, 6510, 667.6),
    ],
)
def test_a_batch_stays_within_its_kernels_and_bytes(
    device: FakeDevice,
    on_device: Callable[[Any], Any],
    make: Callable[[], Any],
    preset: Preset,
    rows: int,
    size: int,
    kernels: int,
    mib: float,
) -> None:
    found, peak = counted(device, on_device(make), preset, rows, size)
    assert 0.9 * kernels <= found <= kernels
    assert 0.9 * mib <= peak / MIB <= mib
    assert not device.blocking(), "a batch waits for nothing"
