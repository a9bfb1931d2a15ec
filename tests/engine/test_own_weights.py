"""Weights of mapped files are copied into memory, and images stay as diffusers' own."""

import types

import pytest
import torch

from darkroom_server.engine.warmup.placement import ALIGNMENT, own_weights


def mapped(offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` at an address with the remainder ``offset``, as in a mapped file."""
    buffer = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (offset - buffer.data_ptr()) % ALIGNMENT
    flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("offset", [0, 8, 24, 60])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_copy_has_the_values_strides_and_alignment(
    offset: int, layout: torch.memory_format
) -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    layer.weight.data = mapped(offset, torch.randn(4, 3, 3, 3).to(memory_format=layout))
    before, address = layer.weight.data, layer.weight.data_ptr()
    assert address % ALIGNMENT == offset
    own_weights(types.SimpleNamespace(components={"vae": layer, "scheduler": object()}))
    after = layer.weight.data
    assert after.data_ptr() != address
    assert after.data_ptr() % ALIGNMENT == offset
    assert after.stride() == before.stride()
    before_values = before.clone()
    before.zero_()  # As if the file changed.
    assert torch.equal(after, before_values)


def test_weights_that_share_memory_with_themselves_are_copied_too() -> None:
    layer = torch.nn.Linear(4, 4)
    row = mapped(8, torch.randn(4))
    layer.weight.data = row.expand(4, 4)
    own_weights(types.SimpleNamespace(components={"unet": layer}))
    assert torch.equal(layer.weight.data, row.expand(4, 4))
    assert layer.weight.data_ptr() != row.data_ptr()
