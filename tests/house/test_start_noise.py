"""The verdicts of ``make start-noise``: each finding fails it."""

from dataclasses import replace

import pytest

from tools.start_noise.__main__ import failures_of
from tools.start_noise.run import Report, Start

START = Start(format="bfloat16 contiguous", rows_before=8, rows_after=16, image="a", seconds=9.0)


def test_starts_that_agree_pass() -> None:
    busy = [START, replace(START, rows_before=2, rows_after=8), replace(START, rows_after=32)]
    assert failures_of(Report(START, busy, start_ratio=1.3)) == []


@pytest.mark.parametrize(
    ("busy", "ratio", "failure"),
    [
        ({"format": "float32 contiguous"}, 1.0, "different formats"),
        ({"image": "b"}, 1.0, "exact images differ"),
        ({"rows_after": 4}, 1.0, "row limit of 4"),
        ({"rows_after": 64}, 1.0, "row limit of 64"),
        ({}, 1.31, "1.31 times"),
    ],
)
def test_each_finding_fails_it(busy: dict[str, object], ratio: float, failure: str) -> None:
    report = Report(START, [START, replace(START, **busy)], start_ratio=ratio)  # type: ignore[arg-type]
    (found,) = failures_of(report)
    assert failure in found
