"""Whether all draw the same pictures: asked first, for to draw others faster proves nothing."""

import asyncio
import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from bench.exactness import psnr
from bench.peers.process import PeerProcess
from bench.peers.protocols import ASKERS
from bench.pipelines import Pipelines
from bench.workload import Request, mixed
from darkroom_server.core.model import ModelRuntime

ALONE_PSNR = 50.0
"""In dB: what a picture drawn alone may differ from the one of a bare ``pipe()``."""

TOGETHER_PSNR = {"float32": 50.0, "bfloat16": 25.0, "float16": 25.0}
"""In dB, by dtype: the same for one drawn in company."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """How the pictures of one peer differ from those of a bare ``pipe()`` in this form.

    ``identical`` of ``alone`` files were equal byte by byte when asked for one after another;
    ``largest`` is the largest difference of a channel, of 255, and ``lowest_psnr`` in dB (None
    where all pixels are equal). The last three are for all at once, which may share batches.
    """

    alone: int
    identical: int
    largest: int
    lowest_psnr: float | None
    together: int
    together_identical: int
    together_lowest_psnr: float | None


class Different(Exception):
    """A peer draws something else; the text is one line."""


def pictures() -> list[Request]:
    """The requests to compare: of every class, and four that may share a batch."""
    alike = [replace(r, steps=8, guidance_scale=7.5) for r in mixed(4, seed=11)]
    return [replace(r, index=i) for i, r in enumerate([*mixed(4, seed=12), *alike])]


def references(folder: str, runtime: ModelRuntime) -> list[bytes]:
    """What a bare ``pipe()`` makes of ``pictures``, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_draw, folder, runtime).result()


def compare(process: PeerProcess, expected: Sequence[bytes], dtype: str) -> Equality:
    """Ask ``process`` for ``pictures``; raises ``Different`` where they are others."""
    alone, together = asyncio.run(_ask(process))
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
        (equality.lowest_psnr, ALONE_PSNR),
        (equality.together_lowest_psnr, TOGETHER_PSNR[dtype]),
    ):
        if ratio is not None and ratio < least:
            raise Different(f"draws other pictures: a PSNR of {ratio:.1f} dB")
    return equality


def _draw(folder: str, runtime: ModelRuntime) -> list[bytes]:
    pipelines = Pipelines(folder, runtime, 1)
    return [pipelines.images([request])[0] for request in pictures()]


async def _ask(process: PeerProcess) -> tuple[list[bytes], list[bytes]]:
    asker = ASKERS[process.peer.wire](process.port)
    wanted = pictures()
    try:
        alone = [await asker.ask(request, "alone", None) for request in wanted]
        together = await asyncio.gather(*(asker.ask(r, "together", None) for r in wanted))
    finally:
        await asker.close()
    return alone, list(together)


def _difference(file: bytes, other: bytes) -> tuple[int, float]:
    """The largest of a channel, and the PSNR in dB."""
    import numpy as np

    one, two = _pixels(file), _pixels(other)
    if one.shape != two.shape:
        raise Different(f"draws pictures of another size: {one.shape} and not {two.shape}")
    return int(np.abs(one.astype(int) - two.astype(int)).max()), psnr(one, two)


def _pixels(file: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _lowest(differences: Sequence[tuple[int, float]]) -> float | None:
    finite = [ratio for largest, ratio in differences if largest]
    return min(finite) if finite else None
