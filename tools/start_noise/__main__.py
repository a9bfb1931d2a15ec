"""``make start-noise``: do starts on a busy machine agree with each other and with a quiet one?"""

import argparse
import signal
import sys

from tools.start_noise.run import Report, measure

ROWS_FACTOR = 2.0
"""A row limit after the load may be this much below or above that of the quiet machine."""

START_FACTOR = 1.3
"""A second start may take this times the imports and the load."""


def main() -> int:
    """Run it and print the findings; 1 if one of them is bad."""
    parser = argparse.ArgumentParser(prog="start-noise", description=__doc__)
    parser.add_argument("--starts", type=int, default=10, help="starts on the busy machine")
    parser.add_argument("--seconds", type=float, default=30.0, help="load after each start")
    parser.add_argument("--turns", type=int, default=3, help="second starts that are timed")
    arguments = parser.parse_args()
    # Ended in any way, it stops its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = measure(arguments.starts, arguments.seconds, arguments.turns)
    failures = list(failures_of(report))
    for failure in failures:
        print(f"FAILED: {failure}")
    print("start-noise: " + ("failed" if failures else "passed"))
    return 1 if failures else 0


def failures_of(report: Report) -> list[str]:
    """What is wrong with ``report``, in words."""
    failures = []
    formats = {start.format for start in (report.quiet, *report.busy)}
    if len(formats) != 1:
        failures.append(f"the starts chose different formats: {sorted(formats)}")
    images = {start.image for start in (report.quiet, *report.busy)}
    if len(images) != 1:
        failures.append(f"exact images differ: {len(images)} of {len(report.busy) + 1}")
    quiet = report.quiet.rows_after
    for number, start in enumerate(report.busy, 1):
        if not quiet / ROWS_FACTOR <= start.rows_after <= quiet * ROWS_FACTOR:
            failures.append(
                f"start {number} has a row limit of {start.rows_after} after its load, the quiet "
                f"one {quiet}"
            )
    if report.start_ratio > START_FACTOR:
        failures.append(
            f"a second start takes {report.start_ratio:.2f} times the imports and the load"
        )
    return failures


if __name__ == "__main__":
    sys.exit(main())
