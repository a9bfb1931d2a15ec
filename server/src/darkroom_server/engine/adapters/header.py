"""The header of a safetensors file, by ordinary reads.

safetensors maps a file, also to read its header only. The kernel kills a process that reads a part
of a mapped file that was cut off (SIGBUS), and with it the jobs of others; a short read is an error
of this file.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError

MAX_BYTES = 100_000_000
"""The longest header that safetensors takes."""

LENGTH_BYTES = 8
"""A file begins with the length of its header, a little-endian number of as many bytes."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_header(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of ``file``, on the meta device but for the scalars, and its metadata.

    Scalars are alphas, whose values matter. Raises ``SafetensorError`` for a file that is damaged,
    and ``OSError``.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > MAX_BYTES:
            raise SafetensorError("its header is too large")
        try:
            header = json.loads(opened.read(length))
            metadata = header.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            expected = LENGTH_BYTES + length + end
            scalars = {key: entry for key, entry in header.items() if not entry["shape"]}
            tensors = {
                key: torch.empty(
                    entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.float32), device="meta"
                )
                for key, entry in header.items()
                if entry["shape"]
            }
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise SafetensorError(f"its header is damaged: {type(error).__name__}") from error
        if (size := os.fstat(opened.fileno()).st_size) != expected:
            raise SafetensorError(f"it has {size} bytes, by its header {expected}")
        tensors |= _values(opened, LENGTH_BYTES + length, scalars)
    return tensors, metadata


def _values(opened: BinaryIO, start: int, entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The values of the tensors of ``entries``; the data of the file begins at ``start``."""
    data, header = b"", {}
    for key, entry in entries.items():
        begin, end = entry["data_offsets"]
        opened.seek(start + begin)
        header[key] = {**entry, "data_offsets": (len(data), len(data) + end - begin)}
        data += opened.read(end - begin)
    text = json.dumps(header).encode()
    # As a file of its own, which safetensors checks: a short read above is one that is cut short.
    loaded: dict[str, torch.Tensor] = safetensors.torch.load(
        len(text).to_bytes(LENGTH_BYTES, "little") + text + data
    )
    return loaded
