"""Checks first that all peers generate the same images, without which times do not compare."""

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.inprocess.pipelines import Pipelines
from bench.inprocess.remote import in_fresh_process
from bench.micro.exactness import psnr
from bench.peers.process import PeerProcess
from bench.peers.protocols import CLIENTS
from bench.peers.servers.config import ServerConfig
from bench.workload.requests import Request, mixed

ALONE_PSNR = {"float32": 50.0, "bfloat16": 40.0, "float16": 40.0}
"""In dB, by dtype: the lowest PSNR of an image generated alone against that of a bare ``pipe()``.

Darkroom keeps latents in float32 between steps, ``pipe()`` rounds them to the dtype of its UNet.
"""

TOGETHER_PSNR = {"float32": 50.0, "bfloat16": 25.0, "float16": 25.0}
"""In dB, by dtype: the same for images that may share a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """How the images of one peer differ from those of a bare ``pipe()`` with the same dtype.

    ``identical`` of ``alone`` files were equal byte by byte when requested one after another;
    ``largest`` is the largest difference of a channel, 0 to 255, and ``lowest_psnr`` is in dB, None
    if all pixels are equal. The last three are for concurrent requests, which may share batches.
    """

    alone: int
    identical: int
    largest: int
    lowest_psnr: float | None
    together: int
    together_identical: int
    together_lowest_psnr: float | None


class Different(Exception):
    """A peer generates other images; the text is one line."""


def requests_to_compare() -> list[Request]:
    """Requests of every class, and four that may share a batch."""
    alike = [replace(r, steps=8, guidance_scale=7.5) for r in mixed(4, seed=11)]
    return [replace(r, index=i) for i, r in enumerate([*mixed(4, seed=12), *alike])]


def references(config: ServerConfig) -> list[bytes]:
    """The files of a bare ``pipe()`` for ``requests_to_compare``, from a process of its own.

    Its UNet has the form of ``config``.
    """
    return in_fresh_process(_generate, config)


def compare(process: PeerProcess, expected: Sequence[bytes], dtype: str) -> Equality:
    """Compare the images of ``process``; raises ``Different`` if they differ too much."""
    alone, together = asyncio.run(_request(process))
    found = [_difference(a, b) for a, b in zip(alone, expected, strict=True)]
    shared = [_difference(a, b) for a, b in zip(together, expected, strict=True)]
    equality = Equality(
        alone=len(found),
        identical=sum(a == b for a, b in zip(alone, expected, strict=True)),
        largest=max(largest for largest, _ in found),
        lowest_psnr=_lowest(found),
        together=len(shared),
        together_identical=sum(a == b for a, b in zip(together, expected, strict=True)),
        together_lowest_psnr=_lowest(shared),
    )
    for ratio, least in (
        (equality.lowest_psnr, ALONE_PSNR[dtype]),
        (equality.together_lowest_psnr, TOGETHER_PSNR[dtype]),
    ):
        if ratio is not None and ratio < least:
            raise Different(f"generates other images: a PSNR of {ratio:.1f} dB")
    return equality


def _generate(config: ServerConfig) -> list[bytes]:
    pipelines = Pipelines(config.folder, config.runtime, 1, compiled=config.compiled)
    return [pipelines.images([request])[0] for request in requests_to_compare()]


async def _request(process: PeerProcess) -> tuple[list[bytes], list[bytes]]:
    client = CLIENTS[process.peer.wire](process.port)
    wanted = requests_to_compare()
    try:
        alone = [await client.generate(request, "alone", None) for request in wanted]
        together = await asyncio.gather(*(client.generate(r, "together", None) for r in wanted))
    finally:
        await client.close()
    # Each request is for one image.
    return [file for (file,) in alone], [file for (file,) in together]


def _difference(file: bytes, other: bytes) -> tuple[int, float]:
    """The largest difference of a channel, and the PSNR in dB."""
    import numpy as np

    one, two = _pixels(file), _pixels(other)
    if one.shape != two.shape:
        raise Different(f"generates images of another size: {one.shape} and not {two.shape}")
    return int(np.abs(one.astype(int) - two.astype(int)).max()), psnr(one, two)


def _pixels(file: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _lowest(differences: Sequence[tuple[int, float]]) -> float | None:
    finite = [ratio for largest, ratio in differences if largest]
    return min(finite) if finite else None
