"""Kernels and live bytes of a batch of the real UNets, counted on shapes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from darkroom_server.core.engine_config import Preset

from . import architectures
from .fake_cuda import CudaTensor, FakeDevice, fake_cuda

MIB = 1 << 20
HALF = torch.float16


def sd14_unet() -> Any:
    """The UNet of CompVis/stable-diffusion-v1-4."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd14_vae() -> Any:
    """The VAE of the same model."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def sd14_text_encoder() -> Any:
    """The text encoder of the same model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )


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
    casts = torch.autocast("cuda", HALF) if preset is Preset.FRUGAL else nullcontext()
    device.reset_counts()
    with casts:
        peak = peak_of(device, lambda: unet(**inputs, return_dict=False))
    return sum(device.kernels.values()), peak


def peak_of(device: FakeDevice, work: Callable[[], object]) -> int:
    """The most bytes of ``work`` at once, besides those that were live before."""
    torch.cuda.reset_peak_memory_stats()
    before = device.live_bytes
    work()
    return device.peak_bytes - before


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


def test_an_image_takes_at_most_2_9_gib(
    device: FakeDevice, on_device: Callable[[Any], Any]
) -> None:
    """Stable Diffusion 1.4 under ``frugal``, 512 × 512: the weights, and the most of any part."""
    unet, vae, encoder = map(on_device, (sd14_unet, sd14_vae, sd14_text_encoder))
    weights = sum(
        each.numel() * each.element_size()
        for part in (unet, vae, encoder)
        for each in (*part.parameters(), *part.buffers())
    )
    _, batch = counted(device, unet, Preset.FRUGAL, 2, 512)
    with torch.autocast("cuda", HALF):
        decode = peak_of(device, lambda: vae.decode(random(1, 4, 64, 64)))
        tokens = CudaTensor(torch.zeros((2, 77), dtype=torch.long, device="meta"))
        encode = peak_of(device, lambda: encoder(tokens))
    assert encode < batch < decode, "autocast keeps float32 copies in the VAE"
    assert 2.4 < (weights + decode) / 2**30 <= 2.9
