"""Measurements at warm-up: the fastest memory format, the best row limit, peak memory."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from darkroom_server.engine.device.memory import PeakMemory
from darkroom_server.engine.failures import is_out_of_memory

log = structlog.get_logger(__name__)

ROWS = (2, 4, 8, 16, 32, 64)
MIN_GAIN = 1.1
"""The least gain of images/s for doubling the rows: below it, mainly the latency grows. A smaller
increase of rows must bring its proportional part."""

MAX_BATCH_SECONDS = 2.0
"""A longer batch is not doubled: no job could join or be cancelled in the meantime."""

PAIRS = 7
"""Batches of each of two row counts that are compared."""

CLEARLY_FASTER = 1.1
"""A format must be this much faster than the plain one: noise must not decide the last bits."""

DenoiserForward = Callable[[int], None]
"""Calls the denoiser once with that many rows of the default size."""


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """How the denoiser's weights are stored in memory."""

    dtype: torch.dtype
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        """The layout of four-dimensional tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} channels_last" if self.channels_last else dtype


def fastest_format(
    denoiser: Any,
    formats: Sequence[MemoryFormat],
    make_forward: Callable[[Any, MemoryFormat], DenoiserForward],
) -> MemoryFormat:
    """The fastest of ``formats`` on this device; the first unless another is clearly faster."""
    if len(formats) == 1:
        return formats[0]
    seconds = {
        memory_format: _format_seconds(denoiser, memory_format, make_forward)
        for memory_format in formats
    }
    best = min(formats, key=lambda memory_format: seconds[memory_format])
    if seconds[formats[0]] < seconds[best] * CLEARLY_FASTER:
        best = formats[0]
    log.info(
        "measured memory formats",
        chosen=str(best),
        milliseconds={
            str(memory_format): round(s * 1000, 1) for memory_format, s in seconds.items()
        },
    )
    return best


def measure_rows(forward: DenoiserForward, most: int) -> dict[int, float]:
    """Seconds of a batch by its rows, up to ``most`` rows.

    Stops if doubling the rows gains too little. At least 2 rows are measured: an image with
    guidance takes 2.
    """
    seconds: dict[int, float] = {}
    for rows in sorted({*(rows for rows in ROWS if rows < most), max(2, min(most, ROWS[-1]))}):
        try:
            if seconds:
                seconds[rows] = _wider(rows, seconds, forward)
            else:
                seconds[rows] = _first(rows, forward)
        except Exception as error:
            if rows == ROWS[0] or not is_out_of_memory(error):
                raise
            log.warning("no memory for more rows", rows=rows, why=str(error))
            break
        if _gains_too_little(rows, seconds) or seconds[rows] > MAX_BATCH_SECONDS:
            break
    return seconds


def _first(rows: int, forward: DenoiserForward) -> float:
    """Seconds of the fastest batch of ``rows`` rows."""
    found = fastest_of(3, lambda: forward(rows))
    if found > MAX_BATCH_SECONDS:
        # Images would never share a batch: measure again, in case of noise.
        found = min(found, _seconds(lambda: forward(rows)))
    return found


def _wider(rows: int, seconds: Mapping[int, float], forward: DenoiserForward) -> float:
    """Seconds of a batch of ``rows`` rows, by its ratio to the largest batch measured before.

    The two alternate, so that other load slows both: the row limit is used until the server ends.
    """
    fewer = max(seconds)
    warm_up = _seconds(lambda: forward(rows))
    if warm_up > MAX_BATCH_SECONDS:
        return warm_up
    ratios: list[float] = []
    spent = 0.0
    while len(ratios) < PAIRS and spent < MAX_BATCH_SECONDS:
        narrow, wide = _seconds(lambda: forward(fewer)), _seconds(lambda: forward(rows))
        ratios.append(wide / narrow)
        spent += narrow + wide
    return seconds[fewer] * statistics.median(ratios)


def best_rows(seconds: Mapping[int, float]) -> int:
    """The smallest of the measured row counts at which doubling gains too little."""
    best = max(seconds)
    if _gains_too_little(best, seconds):
        best = _fewer(best, seconds)
    log.info(
        "measured rows", best=best, milliseconds={r: round(s * 1000, 1) for r, s in seconds.items()}
    )
    return best


def _gains_too_little(rows: int, seconds: Mapping[int, float]) -> bool:
    """Whether ``rows`` generate hardly more images a second than the next smaller row count."""
    fewer = _fewer(rows, seconds)
    if fewer == rows:
        return False
    gain = (rows / seconds[rows]) / (fewer / seconds[fewer])
    worth: float = MIN_GAIN ** math.log2(rows / fewer)
    return gain < worth


def _fewer(rows: int, seconds: Mapping[int, float]) -> int:
    """The next smaller row count that was measured; ``rows`` if there is none."""
    return max((each for each in seconds if each < rows), default=rows)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The peak memory of ``work`` in bytes, above what is in use before it."""
    peak = PeakMemory(device)
    peak.reset()
    work()
    return peak.read()


def fastest_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest run of ``work``, after one run to warm up.

    If that run is longer than ``MAX_BATCH_SECONDS``, it is the only one: warming up is a small part
    of it, and more runs would take minutes.
    """
    warm_up = _seconds(work)
    if warm_up > MAX_BATCH_SECONDS:
        return warm_up
    return min(_seconds(work) for _ in range(times))


def _format_seconds(
    denoiser: Any,
    memory_format: MemoryFormat,
    make_forward: Callable[[Any, MemoryFormat], DenoiserForward],
) -> float:
    candidate = copy.deepcopy(denoiser).to(
        dtype=memory_format.dtype, memory_format=memory_format.layout
    )
    forward = make_forward(candidate, memory_format)
    # One image with guidance, and four: little load and much.
    alone = fastest_of(2, lambda: forward(2))
    if alone > MAX_BATCH_SECONDS:
        return alone * 2  # Four would take four times as long, and would never share a batch.
    return alone + fastest_of(2, lambda: forward(8)) / 4


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
