"""Kernels and live bytes of a batch of the real UNets, counted on shapes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.engine_config import EngineConfig, Preset
from darkroom_server.core.errors import TooLarge
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.dispatch.admission.controller import check_fits
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup.eight_bits import store_in_eight_bits
from darkroom_server.engine.warmup.placement import (
    denoiser_timer,
    measure_memory,
    memory_format_of,
)
from darkroom_server.engine.warmup.presets import resolve
from darkroom_server.engine.warmup.profiler import peak_bytes

from . import architectures
from .conftest import make_job
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
def on_device(device: FakeDevice) -> Callable[..., Any]:
    """Makes a model in half precision on the device, once."""
    made: dict[Any, Any] = {}

    def model(make: Callable[[], Any], *, in_eight_bits: bool = False) -> Any:
        key = make, in_eight_bits
        if key not in made:
            with torch.device("meta"):
                module = make().half().eval()
            if in_eight_bits:
                store_in_eight_bits(module, HALF)
            made[key] = module.to("cuda")
        return made[key]

    return model


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return CudaTensor(torch.empty(shape, dtype=dtype, device="meta"))


def arrange(unet: Any, preset: Preset) -> Any:
    """``unet`` with the attention of ``preset``."""
    if preset is Preset.FRUGAL:
        unet.set_attention_slice("auto")
    else:
        unet.set_attn_processor(AttnProcessor2_0())
    return unet


def counted(device: FakeDevice, unet: Any, preset: Preset, rows: int, size: int) -> tuple[int, int]:
    """Kernels, and bytes besides the weights, of a batch of ``preset``."""
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


def bytes_of(*parts: Any) -> int:
    """The bytes of the weights of ``parts``."""
    return sum(
        each.numel() * each.element_size()
        for part in parts
        for each in (*part.parameters(), *part.buffers())
    )


def peak_of(device: FakeDevice, work: Callable[[], object]) -> int:
    """The most bytes of ``work`` at once, besides those that were live before."""
    torch.cuda.reset_peak_memory_stats()
    before = device.live_bytes
    work()
    return device.peak_bytes - before


COUNTS: list[tuple[Callable[[], Any], Preset, int, int, int, float]] = [
    (sd14_unet, Preset.FAST, 2, 512, 979, 130.1),
    (sd14_unet, Preset.FAST, 32, 512, 979, 2081),
    (sd14_unet, Preset.FAST, 2, 1024, 979, 520.1),
    (sd14_unet, Preset.FRUGAL, 2, 512, 2183, 450.4),
    (sd14_unet, Preset.TINY, 2, 512, 1447, 130.1),
    (architectures.sdxl_unet, Preset.FRUGAL, 2, 1024, 6510, 667.6),
]
"""Of a model under a preset with a number of rows of a size: kernels, MiB."""


@pytest.mark.parametrize("page", ["README.md", "deploy/README.md", "docs/models.md"])
def test_the_pages_have_these_counts(page: str) -> None:
    text = " ".join((Path(__file__).parents[2] / page).read_text().split())
    for make, preset, rows, size, kernels, mib in COUNTS:
        if (make, rows, size) != (sd14_unet, 2, 512):
            continue
        if page == "docs/models.md":
            assert f"| `{preset}` | {kernels:,} | {mib:.0f} MiB |" in text
        elif preset is not Preset.TINY:
            assert f" {kernels:,} kernels and {mib:.0f} MiB" in text


@pytest.mark.parametrize(("make", "preset", "rows", "size", "kernels", "mib"), COUNTS)
def test_a_batch_stays_within_its_kernels_and_bytes(
    device: FakeDevice,
    on_device: Callable[..., Any],
    make: Callable[[], Any],
    preset: Preset,
    rows: int,
    size: int,
    kernels: int,
    mib: float,
) -> None:
    unet = arrange(on_device(make, in_eight_bits=preset is Preset.TINY), preset)
    found, peak = counted(device, unet, preset, rows, size)
    assert 0.9 * kernels <= found <= kernels
    assert 0.9 * mib <= peak / MIB <= mib
    assert not device.blocking(), "a batch waits for nothing"


def test_an_image_takes_at_most_2_9_gib(device: FakeDevice, on_device: Callable[..., Any]) -> None:
    """Stable Diffusion 1.4 under ``frugal``, 512 × 512: the weights, and the most of any part."""
    unet, vae, encoder = map(on_device, (sd14_unet, sd14_vae, sd14_text_encoder))
    weights = bytes_of(unet, vae, encoder)
    _, batch = counted(device, arrange(unet, Preset.FRUGAL), Preset.FRUGAL, 2, 512)
    with torch.autocast("cuda", HALF):
        decode = peak_of(device, lambda: vae.decode(random(1, 4, 64, 64)))
        tokens = CudaTensor(torch.zeros((2, 77), dtype=torch.long, device="meta"))
        encode = peak_of(device, lambda: encoder(tokens))
    assert encode < batch < decode, "autocast keeps float32 copies in the VAE"
    assert 2.4 < (weights + decode) / 2**30 <= 2.9


CARD_BYTES = 8 * 10**9


def measured(unet: Any, vae: Any) -> tuple[MemoryNeeds, SlicedAttention]:
    """What a server measures of Stable Diffusion 1.4 under ``frugal``, and the UNet's attention."""
    config = EngineConfig(models=(), device="cuda", preset=Preset.FRUGAL)
    runtime = resolve(config, StableDiffusion.half)
    attention = SlicedAttention(arrange(unet, Preset.FRUGAL))
    tokenizer = SimpleNamespace(model_max_length=77)
    parts = SimpleNamespace(unet=unet, vae=vae, vae_scale_factor=8, tokenizer=tokenizer)
    family = StableDiffusion(parts)
    memory_format = memory_format_of(family, runtime)

    def decode(latents: torch.Tensor, _: object) -> Any:
        with runtime.precision(HALF):
            return vae.decode(latents)

    # The server's own looks at values, of which there are none here.
    decoder: Any = SimpleNamespace(tile_pixels=None, decode_scaled=decode)
    time_batch = denoiser_timer(family, memory_format, runtime)
    needs = measure_memory(time_batch, family, decoder, memory_format, runtime)
    with attention.replaced_by_sdpa():
        sdpa = peak_bytes(runtime.device, lambda: time_batch(2)) // 2
    heads = attention.heads_per_slice
    return replace(needs, heads_per_slice=heads, sdpa_bytes_per_row=sdpa), attention


def test_a_card_of_8_gb_takes_images_of_1024(
    device: FakeDevice, on_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion 1.4 under ``frugal``: with slices of one head, and with SDPA without room.

    A batch that took more than the card has would raise.
    """
    unet, vae, encoder = map(on_device, (sd14_unet, sd14_vae, sd14_text_encoder))
    others = device.live_bytes - bytes_of(unet, vae, encoder)
    monkeypatch.setattr(device, "total_bytes", others + CARD_BYTES)
    needs, attention = measured(unet, vae)
    job = make_job("large", width=1024, height=1024)
    check_fits(job, replace(fake_model(), memory=needs))

    assert not attention.fit(needs, 1024, 1024)
    assert processors(unet) == {(SlicedAttnProcessor, 1)}
    kernels, sliced = counted(device, unet, Preset.FRUGAL, 2, 1024)
    assert 0.9 * 4103 <= kernels <= 4103
    assert 0.9 * 1798 <= sliced / MIB <= 1798
    assert 0.5 * needs.needed(1024, 1024, 2) < sliced <= needs.needed(1024, 1024, 2)

    coarse = replace(needs, heads_per_slice=0, sdpa_bytes_per_row=0)
    with pytest.raises(TooLarge):  # The control: slices that stay as they are.
        check_fits(job, replace(fake_model(), memory=coarse))

    short = replace(needs, available_bytes=sliced // 2)
    assert attention.fit(short, 1024, 1024)
    assert processors(unet) == {(AttnProcessor2_0, None)}
    kernels, whole = counted(device, unet, Preset.FRUGAL, 2, 1024)
    assert 0.9 * 1447 <= kernels <= 1447
    assert 0.9 * 540.1 <= whole / MIB <= 540.1
    assert whole <= short.available_bytes
    assert not attention.fit(needs, 512, 512)
    assert processors(unet) == {(SlicedAttnProcessor, 4)}


def processors(unet: Any) -> set[tuple[type, int | None]]:
    """The kinds of attention in ``unet``, and the heads of their slices."""
    found = unet.attn_processors.values()
    return {(type(each), getattr(each, "slice_size", None)) for each in found}
