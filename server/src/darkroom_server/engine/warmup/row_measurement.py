"""Seconds of a batch by its rows, and the best row limit, from noisy readings. Knows no torch.

Other programs can only make a batch slower, so the minimum of several readings is the best estimate
of a quiet machine. The readings of different row counts are interleaved, so that a busy moment
affects all of them, and they are repeated until the two lowest of each row count agree.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import structlog

log = structlog.get_logger(__name__)

ROWS = (2, 4, 8, 16, 32, 64)

MIN_GAIN = 1.1
"""The least gain of images/s for doubling the rows: below it, mainly the latency grows. A smaller
increase of rows must bring its proportional part."""

MAX_BATCH_SECONDS = 2.0
"""A longer batch is not doubled: no job could join or be cancelled in the meantime."""

AGREEMENT = 1.05
"""The two lowest readings agree if their ratio is at most this."""

MIN_READINGS = 3
"""Of each row count; the first one also warms up."""

PLAUSIBLE = 1.25
"""A batch takes at most this many times its proportional part of a batch of fewer rows: it could
have been split into such batches."""

MAX_ROUNDS = 8
MAX_SECONDS = 12.0
"""After this many rounds, or about this many seconds of readings, those that still do not agree are
used as they are. Real batches correct them."""

CONFIRMATIONS, MAX_CONFIRMATIONS = 4, 16
"""Further readings around the best row count that must not change it, and the most of them."""

TimeBatch = Callable[[int], float]
"""Runs one batch of that many rows of the default size; returns its seconds.

Raises ``MemoryError`` if they do not fit.
"""

Readings = dict[int, list[float]]


def row_counts(most: int) -> tuple[int, ...]:
    """The row counts to measure, up to ``most``.

    At least 2 rows are measured: an image with guidance takes 2.
    """
    largest = max(2, min(most, ROWS[-1]))
    return (*(rows for rows in ROWS if rows < largest), largest)


def measure_rows(time_batch: TimeBatch, counts: Sequence[int]) -> dict[int, float]:
    """Seconds of a batch by its rows, for those of ``counts``, in ascending order, worth measuring.

    They never decrease with the rows. Larger counts are not measured after a batch of more than
    ``MAX_BATCH_SECONDS``, after two doublings that gained nothing, or without memory.
    """
    readings: Readings = {}
    for rows in counts:
        try:
            _read_first(rows, readings, time_batch)
        except MemoryError as error:
            if not readings:
                raise
            readings.pop(rows, None)
            log.warning("no memory for more rows", rows=rows, why=str(error))
            break
        if min(readings[rows]) > MAX_BATCH_SECONDS or _gains_nothing(readings, time_batch):
            break
    _repeat(readings, time_batch)
    _confirm(readings, time_batch)
    return _lowest(readings)


def best_rows(seconds: Mapping[int, float]) -> int:
    """The smallest measured row count from which no larger one gains enough.

    Every larger count is compared, not only the next one: one slow reading must not end the search.
    """
    counts = sorted(seconds)
    able = [r for r in counts if seconds[r] <= MAX_BATCH_SECONDS] or counts[:1]
    return next(
        rows
        for rows in able
        if not any(_is_better(seconds, rows, more) for more in able if more > rows)
    )


def agreed_seconds(read: Callable[[], float]) -> float:
    """The lowest of several readings, taken until the two lowest agree.

    A reading above ``MAX_BATCH_SECONDS`` is the only one: more of them would take minutes.
    """
    readings = [read()]
    while readings[0] <= MAX_BATCH_SECONDS and len(readings) < MIN_READINGS + MAX_ROUNDS:
        readings.append(read())
        if len(readings) >= MIN_READINGS and _agree(readings):
            break
    return min(readings)


def _read_first(rows: int, readings: Readings, time_batch: TimeBatch) -> None:
    """The first reading of ``rows``; more of them while it is too long to be believed."""
    found = readings[rows] = [time_batch(rows)]
    while len(found) < MIN_READINGS and not _believable(rows, readings):
        log.info(
            "implausible reading, measured again", rows=rows, milliseconds=_milliseconds(found[-1])
        )
        found.append(time_batch(rows))
        if min(readings) == rows:
            break  # A slow model: there is no smaller batch to compare with.


def _believable(rows: int, readings: Readings) -> bool:
    return min(readings[rows]) <= MAX_BATCH_SECONDS and _is_proportional(rows, readings)


def _gains_nothing(readings: Readings, time_batch: TimeBatch) -> bool:
    """Whether the last two doublings together gained nothing, by several readings of each."""
    last = sorted(readings)[-3:]
    if len(last) < 3:
        return False
    for _ in range(MIN_READINGS):
        if _gain({rows: min(readings[rows]) for rows in last}, last[0], last[2]) >= 1.0:
            return False
        for rows in last:
            readings[rows].append(time_batch(rows))
    return True


def _repeat(readings: Readings, time_batch: TimeBatch) -> None:
    """Measure again, in rounds, the row counts whose readings do not agree or are implausible."""
    for _ in range(MAX_ROUNDS):
        unsettled = [rows for rows in readings if not _is_settled(rows, readings)]
        if not unsettled:
            return
        if _spent(readings) > MAX_SECONDS:
            break
        for rows in unsettled:
            if _agree(readings[rows]):
                log.info(
                    "implausible reading, measured again",
                    rows=rows,
                    milliseconds=_milliseconds(min(readings[rows])),
                )
            readings[rows].append(time_batch(rows))
    log.warning(
        "measurements do not agree: the machine is busy; real batches will correct them",
        milliseconds={
            rows: [_milliseconds(each) for each in sorted(found)[:3]]
            for rows, found in readings.items()
        },
    )


def _spent(readings: Readings) -> float:
    """Seconds of all readings; a long one counts in part, or a few of them would end the search."""
    return sum(min(each, MAX_BATCH_SECONDS) for found in readings.values() for each in found)


def _is_settled(rows: int, readings: Readings) -> bool:
    found = readings[rows]
    if min(found) > MAX_BATCH_SECONDS:
        return True  # ``_read_first`` has measured it again if it was implausible.
    return (
        len(found) >= MIN_READINGS
        and _agree(found)
        and _is_proportional(rows, readings)
        and all(min(found) <= min(more) * AGREEMENT for r, more in readings.items() if r > rows)
    )


def _agree(found: Sequence[float]) -> bool:
    lowest = sorted(found)[:2]
    return len(lowest) == 2 and lowest[1] <= lowest[0] * AGREEMENT


def _is_proportional(rows: int, readings: Readings) -> bool:
    return all(
        min(readings[rows]) <= min(found) * rows / fewer * PLAUSIBLE
        for fewer, found in readings.items()
        if fewer < rows
    )


def _confirm(readings: Readings, time_batch: TimeBatch) -> None:
    """Measure the best row count and its neighbours again until it stays the same."""
    best, confirmed = 0, 0
    for _ in range(MAX_CONFIRMATIONS):
        previous, best = best, best_rows(_lowest(readings))
        confirmed = confirmed + 1 if best == previous else 0
        if confirmed == CONFIRMATIONS or _spent(readings) > 1.5 * MAX_SECONDS:
            return
        for rows in _neighbours(best, readings):
            readings[rows].append(time_batch(rows))


def _neighbours(best: int, readings: Readings) -> list[int]:
    """``best`` and the counts beside it; without those that take too long."""
    counts = sorted(readings)
    at = counts.index(best)
    beside = counts[max(0, at - 1) : at + 2]
    return [rows for rows in beside if min(readings[rows]) <= MAX_BATCH_SECONDS]


def _lowest(readings: Readings) -> dict[int, float]:
    """The lowest reading of each row count, where fewer rows never take longer.

    They cannot, because a batch could be filled up with rows.
    """
    return {
        rows: min(min(found) for more, found in readings.items() if more >= rows)
        for rows in readings
    }


def _is_better(seconds: Mapping[int, float], rows: int, more: int) -> bool:
    """Whether ``more`` rows gain at least ``MIN_GAIN`` for each doubling."""
    return _gain(seconds, rows, more) >= float(MIN_GAIN ** math.log2(more / rows))


def _gain(seconds: Mapping[int, float], rows: int, more: int) -> float:
    return (more / seconds[more]) / (rows / seconds[rows])


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
