"""The decoder: the bytes that it makes of values, and what it does without memory."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from darkroom_server.core.events import Counted
from darkroom_server.engine.components.decoder import Decoder, pixels_of
from darkroom_server.engine.failures import OUT_OF_MEMORY

from .fake_cuda import FakeDevice, fake_cuda

HALVES = [
    torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for dtype in (torch.float16, torch.bfloat16)
]
SINGLES = torch.linspace(-1.1, 1.1, 300_000)


def image_processor(decoded: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of diffusers' VaeImageProcessor, which rounds with NumPy."""
    unit = (decoded * 0.5 + 0.5).clamp(0, 1)
    found: NDArray[np.uint8] = (
        (unit.permute(1, 2, 0).float().numpy() * 255).round().astype(np.uint8)
    )
    return found


@pytest.mark.parametrize("values", [*HALVES, SINGLES], ids=lambda values: str(values.dtype))
@pytest.mark.parametrize("on_device", [False, True])
def test_the_bytes_are_those_of_diffusers(values: torch.Tensor, on_device: bool) -> None:
    finite = values[torch.isfinite(values)]
    decoded = finite[: len(finite) // 12 * 12].reshape(3, 4, -1)
    wanted = image_processor(decoded)
    with fake_cuda() if on_device else nullcontext() as device:
        placed = decoded.to("cuda" if device else "cpu")
        found = pixels_of((placed * 0.5 + 0.5).clamp(0, 1))
        if device is not None:
            assert [str(each.kind) for each in device.traffic] == ["to device", "to host"]
    assert found.dtype == np.uint8
    assert len(np.unique(found)) == 256
    assert (found == wanted).all()
    assert (found != image_processor(decoded + 0.02)).any()


class ShortOfMemory:
    """Lets the first ``failures`` decodes fail, and those of more than ``largest`` latents."""

    def __init__(self, vae: Any, failures: int = 0, largest: int = 1 << 30) -> None:
        self.calls: list[int] = []
        decode = vae._decode if largest == 1 << 30 else vae.decoder.forward

        def limited(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(z.shape[-1])
            if len(self.calls) <= failures or z.shape[-1] > largest:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(z, *args, **kwargs)

        if largest == 1 << 30:
            vae._decode = limited
        else:
            vae.decoder.forward = limited


@pytest.fixture
def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=64,
    ).requires_grad_(False)


def decoder_of(vae: Any) -> Decoder:
    return Decoder(vae.to("cuda"), nullcontext)


def latents() -> torch.Tensor:
    return torch.randn((1, 4, 32, 32), generator=torch.Generator().manual_seed(1)).to("cuda")


def test_a_decode_without_memory_is_tried_again(vae: Any, cuda: FakeDevice) -> None:
    decoder = decoder_of(vae)
    wanted = decoder.decode(latents())
    short = ShortOfMemory(vae, failures=1)
    found = decoder.decode(latents())
    assert isinstance(found, np.ndarray)
    assert (found == wanted).all()
    assert len(short.calls) == 2
    assert cuda.emptied_caches == 1
    assert not decoder.tiled


def test_then_it_decodes_by_tiles(vae: Any, cuda: FakeDevice) -> None:
    decoder = decoder_of(vae)
    whole = decoder.decode(latents())
    short = ShortOfMemory(vae, largest=16)
    found = decoder.decode(latents())
    assert isinstance(found, np.ndarray)
    assert isinstance(whole, np.ndarray)
    assert decoder.tiled
    assert short.calls[:2] == [32, 32]
    assert max(short.calls[2:]) == 16
    assert found.shape == whole.shape
    # Tiles see less of their surroundings, so pixels change; the picture is the same.
    assert (found != whole).any()
    assert np.abs(found.astype(int) - whole).mean() < 8
    assert not vae.use_tiling
    assert vae.tile_latent_min_size == 32


def test_then_it_fails(vae: Any, cuda: FakeDevice) -> None:
    decoder = decoder_of(vae)
    ShortOfMemory(vae, largest=1)
    assert decoder.decode(latents()) is OUT_OF_MEMORY
    assert decoder.counts[Counted.OUT_OF_MEMORY_FAILED] == 1
    assert not decoder.tiled


def test_another_error_is_not_tried_again(vae: Any, cuda: FakeDevice) -> None:
    decoder = decoder_of(vae)
    calls = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise ValueError("not of memory")

    vae._decode = broken
    decoder.decode(latents())
    assert len(calls) == 1
