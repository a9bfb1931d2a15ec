"""What the model itself says, at warm-up: its fastest form, its best batch, its memory."""

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
"""Doubling the rows must bring this many times the images/s, or only the latency grows; less than
doubling them must bring its part of it."""

MAX_PASS_SECONDS = 2.0
"""A pass longer than this is not doubled: nobody could join or leave in the meantime."""

PAIRS = 7
"""Passes of each of two widths that are compared."""

CLEARLY_FASTER = 1.1
"""A form must beat the plain one by this, so that noise does not change the pictures' last bits."""

DenoiserForward = Callable[[int], None]
"""Runs the denoiser once over so many rows of the default size."""


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """How the denoiser's weights lie in memory."""

    dtype: torch.dtype
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        """The layout of four-dimensional tensors."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def fastest_format(
    denoiser: Any,
    forms: Sequence[MemoryFormat],
    make_pass: Callable[[Any, MemoryFormat], DenoiserForward],
) -> MemoryFormat:
    """The fastest of ``forms`` on this device; the first of them unless another is clearly so."""
    if len(forms) == 1:
        return forms[0]
    seconds = {form: _form_seconds(denoiser, form, make_pass) for form in forms}
    best = min(forms, key=lambda form: seconds[form])
    if seconds[forms[0]] < seconds[best] * CLEARLY_FASTER:
        best = forms[0]
    log.info(
        "measured forms",
        chosen=_name(best),
        milliseconds={_name(form): round(s * 1000, 1) for form, s in seconds.items()},
    )
    return best


def measure_rows(forward: DenoiserForward, most: int) -> dict[int, float]:
    """Seconds of a pass by its rows, of which there are at most ``most``.

    Ends once doubling brings too little. ``most`` is at least 2: an image with guidance must fit.
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
            log.warning("no memory for wider passes", rows=rows, why=str(error))
            break
        if _brings_too_little(rows, seconds) or seconds[rows] > MAX_PASS_SECONDS:
            break
    return seconds


def _first(rows: int, forward: DenoiserForward) -> float:
    """Seconds of the fastest pass of ``rows`` rows."""
    found = fastest_of(3, lambda: forward(rows))
    if found > MAX_PASS_SECONDS:
        # No image would ever share a pass: not on the word of one noisy moment.
        found = min(found, _seconds(lambda: forward(rows)))
    return found


def _wider(rows: int, seconds: Mapping[int, float], forward: DenoiserForward) -> float:
    """Seconds of a pass of ``rows`` rows, from how much longer than the next narrower it takes.

    In turns: what else the machine does then slows both, and the knee holds for the server's life.
    """
    fewer = max(seconds)
    warm_up = _seconds(lambda: forward(rows))
    if warm_up > MAX_PASS_SECONDS:
        return warm_up
    ratios: list[float] = []
    spent = 0.0
    while len(ratios) < PAIRS and spent < MAX_PASS_SECONDS:
        narrow, wide = _seconds(lambda: forward(fewer)), _seconds(lambda: forward(rows))
        ratios.append(wide / narrow)
        spent += narrow + wide
    return seconds[fewer] * statistics.median(ratios)


def best_rows(seconds: Mapping[int, float]) -> int:
    """The smallest of the measured row counts at which doubling brings too little."""
    best = max(seconds)
    if _brings_too_little(best, seconds):
        best = _fewer(best, seconds)
    log.info(
        "measured rows", best=best, milliseconds={r: round(s * 1000, 1) for r, s in seconds.items()}
    )
    return best


def _brings_too_little(rows: int, seconds: Mapping[int, float]) -> bool:
    """Whether ``rows`` bring hardly more images a second than the next fewer that were measured."""
    fewer = _fewer(rows, seconds)
    if fewer == rows:
        return False
    gain = (rows / seconds[rows]) / (fewer / seconds[fewer])
    worth: float = MIN_GAIN ** math.log2(rows / fewer)
    return gain < worth


def _fewer(rows: int, seconds: Mapping[int, float]) -> int:
    """The next fewer rows that were measured; ``rows`` where there are none."""
    return max((each for each in seconds if each < rows), default=rows)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The memory that ``work`` takes at its peak, besides what is in use already."""
    peak = PeakMemory(device)
    peak.reset()
    work()
    return peak.read()


def fastest_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest run of ``work``, after one that warms up.

    Where that one is longer than ``MAX_PASS_SECONDS`` it is the only one: what is warmed up is
    little of it, and a start would take minutes.
    """
    warm_up = _seconds(work)
    if warm_up > MAX_PASS_SECONDS:
        return warm_up
    return min(_seconds(work) for _ in range(times))


def _form_seconds(
    denoiser: Any, form: MemoryFormat, make_pass: Callable[[Any, MemoryFormat], DenoiserForward]
) -> float:
    candidate = copy.deepcopy(denoiser).to(dtype=form.dtype, memory_format=form.layout)
    forward = make_pass(candidate, form)
    # A lone image with guidance, and four: the two ends of the day.
    alone = fastest_of(2, lambda: forward(2))
    if alone > MAX_PASS_SECONDS:
        return alone * 2  # Four would take four times as long, and never share a pass.
    return alone + fastest_of(2, lambda: forward(8)) / 4


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _name(form: MemoryFormat) -> str:
    return f"{str(form.dtype).removeprefix('torch.')}{' channels_last' * form.channels_last}"
