"""Damaged pictures through the worker: `python -m tests.server.uploads.fuzz --inputs 10000`.

Each input is a good picture with changed, removed, repeated or foreign bytes, or with another
header. Each must be decoded or rejected, in bounded time and memory; no worker may die or hang.
"""

import argparse
import asyncio
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from darkroom_server.core.errors import InvalidRequest
from darkroom_server.uploads.decoder_pool import DecoderPool, Fit
from darkroom_server.uploads.failure import DecodeFailure
from darkroom_server.uploads.fit import Bounds
from tests.server.uploads.pictures import DAMAGED, NOT_PICTURES, TOO_LARGE, encoded, halves

AT_ONCE = 3
BOUNDS = Bounds(least=64, most=256, multiple=8)
FITS = (
    Fit(kind="check", bounds=BOUNDS),
    Fit(kind="cover", bounds=BOUNDS),
    Fit(kind="cover", bounds=BOUNDS, width=64, height=128, gray=True),
    Fit(kind="within", bounds=BOUNDS),
)


def seeds() -> list[bytes]:
    """Good pictures of every format, with every part that a file may have."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    rgb, alpha = halves((70, 50)), PIL.Image.new("RGBA", (70, 50), (9, 99, 199, 50))
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(180)]}
    return [
        encoded(rgb, exif=exif),
        encoded(alpha),
        encoded(PIL.Image.new("I;16", (70, 50), 12345)),
        encoded(PIL.Image.new("1", (70, 50))),
        encoded(rgb.convert("P"), transparency=0),
        encoded(rgb, **frames),
        encoded(rgb, "JPEG", exif=exif),
        encoded(rgb, "JPEG", progressive=True, icc_profile=bytes(200)),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb.convert("L"), "JPEG"),
        encoded(rgb, "WEBP", exif=exif),
        encoded(alpha, "WEBP", lossless=True),
        encoded(rgb, "WEBP", **frames),
        *NOT_PICTURES.values(),
        *DAMAGED.values(),
        *TOO_LARGE.values(),
    ]


def inputs(count: int, seed: int) -> Iterator[bytes]:
    """``count`` inputs, the same for the same ``seed``."""
    chance, pictures = random.Random(seed), seeds()
    for _ in range(count):
        data = bytearray(chance.choice(pictures))
        for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
            _change(data, chance)
        if chance.random() < 0.5:
            _repair(data)
        yield bytes(data)


def _change(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    # The headers are worth more attempts than the pixels.
    at = min(at, chance.choice((16, 64, 256, len(data))))
    match chance.randrange(6):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + 4] = chance.choice(
                (bytes(4), b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", struct.pack(">I", 10_000))
            )
        case 2:
            del data[at:]
        case 3:
            del data[at : at + chance.randrange(1, 64)]
        case 4:
            data[at:at] = data[at : at + chance.randrange(1, 512)]
        case 5:
            data[at:at] = chance.randbytes(chance.randrange(1, 64))


def _repair(data: bytearray) -> None:
    """Correct the checksums of a PNG, so that what is behind them is read."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        body = bytes(data[at + 4 : at + 8 + size])
        data[at + 8 + size : at + 12 + size] = struct.pack(">I", zlib.crc32(body))
        at += 12 + size


async def fuzz(decoder: DecoderPool, count: int, seed: int) -> tuple[Counter[str], float]:
    """Decode ``count`` inputs: how often each end came, and the longest time, in seconds."""
    ends: Counter[str] = Counter()
    slowest = 0.0
    todo = inputs(count, seed)

    async def work(owner: str) -> None:
        nonlocal slowest
        for index, data in enumerate(todo):
            began = time.monotonic()
            try:
                await decoder.decode(owner, "image", data, FITS[index % len(FITS)])
                ends["decoded"] += 1
            except InvalidRequest as error:
                says = error.violations[0].description
                ends["has too many pixels" if says.startswith("has ") else says] += 1
            slowest = max(slowest, time.monotonic() - began)

    await asyncio.gather(*(work(str(number)) for number in range(AT_ONCE)))
    return ends, slowest


def peak_bytes(decoder: DecoderPool) -> int:
    """The most resident memory that a worker of ``decoder`` had."""
    peaks = []
    for pid in decoder.pids:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return max(peaks)


async def main() -> None:
    """Fuzz, print how the inputs ended, and exit with 1 if a worker died or took too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    failures: Counter[DecodeFailure] = Counter()
    decoder = DecoderPool(
        workers=2,
        max_pixels=64_000_000,
        timeout=30.0,
        on_failure=lambda failure: failures.update([failure]),
    )
    try:
        ends, slowest = await fuzz(decoder, options.inputs, options.seed)
        peak = peak_bytes(decoder)
    finally:
        await decoder.close()
    for end, count in ends.most_common():
        print(f"{count:7} {end}")
    print(f"slowest: {slowest:.2f} s; most memory of a worker: {peak / 1024**2:.0f} MiB")
    if failures[DecodeFailure.WORKER_DIED] or failures[DecodeFailure.TOO_SLOW]:
        raise SystemExit(1)


if __name__ == "__main__":
    asyncio.run(main())
