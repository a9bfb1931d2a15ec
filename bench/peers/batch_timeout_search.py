"""Finds the best batch timeout of each peer that batches: how long a batch waits to fill."""

from collections.abc import Mapping, Sequence

from bench.peers.registry import PEERS
from bench.peers.report.figures import images_per_second
from bench.peers.scenarios import Scenario
from bench.report.results import Run

DEFAULT = 0.01
"""Seconds if none were tried: callers send the next request within a few milliseconds."""

TRIED: Sequence[float] = (0.002, DEFAULT, 0.05, 0.2)
"""What ``make bench-full`` tries, in seconds."""

CLOSE = 0.98
"""Share of the most images/s. The shortest timeout that reaches it is best: a lone caller waits
for it too."""


def trials(timeouts: Sequence[float]) -> list[Scenario]:
    """The closed loops that try ``timeouts``, in seconds."""
    return [Scenario(batch_timeout=timeout) for timeout in timeouts]


def tried(runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """Images/s of each peer by the timeout in seconds."""
    found: dict[str, dict[float, float]] = {}
    for run in runs:
        timeout = run.figures.get("batch_timeout_seconds")
        if timeout is not None and run.scenario == Scenario(batch_timeout=timeout).name:
            found.setdefault(run.peer, {})[timeout] = images_per_second(run)
    return {name: found[name] for name in PEERS if name in found}


def best(rates: Mapping[float, float]) -> float:
    """The timeout in seconds that a peer gets, of those tried."""
    enough = CLOSE * max(rates.values())
    return min(timeout for timeout, rate in rates.items() if rate >= enough)
