"""Copies of weights that are parts of mapped files."""

import torch

ALIGNMENT = 64
"""Bytes: of torch's own tensors, and the size of the widest registers."""


def owned(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight``, which is on the CPU and may be a part of a mapped file.

    So that a model that is loaded is in memory, and that a file that is cut short later does not
    end the process. Each page is touched. The copy has the same strides, and its address the same
    remainder: kernels add in another order if an address is not a multiple of their registers'
    size, and tensors of mapped files have any. With others, images would differ from diffusers' own
    by one level.
    """
    offset, layouts = weight.data_ptr() % ALIGNMENT, [torch.contiguous_format]
    if weight.dim() == 4:
        layouts.append(torch.channels_last)
    is_dense = any(weight.is_contiguous(memory_format=each) for each in layouts)
    if not offset or offset % weight.itemsize or not is_dense:
        return weight.clone()
    size = weight.nbytes
    buffer = torch.empty(size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (offset - buffer.data_ptr()) % ALIGNMENT
    flat = buffer[start : start + size].view(weight.dtype)
    return flat.as_strided(weight.size(), weight.stride()).copy_(weight)
