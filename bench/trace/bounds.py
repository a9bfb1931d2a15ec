"""What no policy can do better: the fewest loads of a trace, and the work that waits in bursts."""

import math
from collections.abc import Iterable, Sequence

from bench.trace.requests import TraceRequest


def least_loads(requests: Sequence[TraceRequest], places: int, seconds: float = 0.0) -> int:
    """The loads without which nobody serves ``requests`` on a device of ``places`` models.

    Those that arrive within the same ``seconds`` may be served in any order, but no later; with 0
    they are served in the order of arrival. To keep the models that are needed next takes the
    fewest (Belady 1966). With ``seconds`` it is a lower bound: what is loaded last in a window need
    not stay.
    """
    windows: list[set[str]] = []
    number = -1
    for index, request in enumerate(requests):
        window = int(request.arrival // seconds) if seconds else index
        if window != number:
            windows.append(set())
            number = window
        windows[-1].add(request.model)
    needed: list[dict[str, float]] = []
    after: dict[str, float] = {}
    for index in range(len(windows) - 1, -1, -1):
        needed.append({model: after.get(model, math.inf) for model in windows[index]})
        after.update(dict.fromkeys(windows[index], index))
    loads = 0
    held: dict[str, float] = {}
    for models, next_needs in zip(windows, reversed(needed), strict=True):
        loaded = models - held.keys()
        loads += len(loaded)
        held.update(next_needs)

        def soonest(model: str, held: dict[str, float] = held) -> tuple[float, str]:
            return held[model], model

        # In the order of arrival, what is loaded takes a place.
        last = min(loaded, default=None) if not seconds else None
        kept = sorted(held, key=lambda model: (model != last, *soonest(model)))[:places]
        held = {model: held[model] for model in kept}
    return loads


def longest_backlog(work: Iterable[tuple[float, float]]) -> float:
    """The most seconds of ``work`` that wait at once: moments of arrival, each with its seconds."""
    longest = backlog = last = 0.0
    for arrival, seconds in work:
        backlog = max(0.0, backlog - (arrival - last)) + seconds
        last = arrival
        longest = max(longest, backlog)
    return longest
