"""``docs/benchmarks.md``, the part on overload."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.goals import Goal
from bench.quantiles import quantile
from bench.results import Results
from bench.sections import table

IMAGE, EXPIRED, MALFORMED = "image", "expired", "malformed"

PROMPT_SECONDS = 1.0
"""A refusal that takes longer, on a machine that is busy with images, is not a prompt one."""

NAMES = {"darkroom": "Darkroom", "first come": "first come, first served"}


class Call(NamedTuple):
    """One call: ``outcome`` is IMAGE, EXPIRED, MALFORMED or the reason of a refusal.

    ``arrival`` is since the start, ``limit`` the time until its deadline, both in seconds.
    """

    steps: int
    arrival: float
    limit: float
    outcome: str
    seconds: float

    @property
    def refused(self) -> bool:
        """The server said no, in a well-formed way."""
        return self.outcome not in (IMAGE, EXPIRED) and not self.outcome.startswith(MALFORMED)


def in_time(calls: Sequence[Call], seconds: float) -> list[Call]:
    """The images that were there before their deadlines, and while requests still came."""
    return [
        call
        for call in calls
        if call.outcome == IMAGE
        and call.seconds <= call.limit
        and call.arrival + call.seconds <= seconds
    ]


def goals(results: Results) -> list[Goal]:
    """What overload shall look like."""
    seconds = results.settings["seconds"]
    calls = _calls(results)
    ours, theirs = (len(in_time(each, seconds)) / seconds for each in calls.values())
    capacity = results.figures["darkroom"]["images_per_second"]
    refusals = [call.seconds for call in calls["darkroom"] if call.refused]
    odd = sum(call.outcome.startswith(MALFORMED) for call in calls["darkroom"])
    found = [
        Goal("goodput over what the engine can do", ours / capacity, 0.9, True),
        Goal("calls that end in neither", float(odd), 0.0, False),
    ]
    if theirs:
        found.append(Goal("goodput over first come, first served", ours / theirs, 1.0, True))
    if refusals:
        late = quantile(refusals, 0.99)
        found.append(Goal("p99 of the refusals, seconds", late, PROMPT_SECONDS, False))
    return found


def page(results: Results) -> str:
    """The section."""
    settings = results.settings
    low, high = settings["patience"]
    note = f"\n\n{results.note}" if results.note else ""
    first = results.figures["darkroom"]
    return (
        "## Overload\n\n"
        f"{results.date}, {results.machine.text}. {settings['callers']} callers with a connection "
        f"each ask for {settings['factor']:g} times what the engine can do, for "
        f"{settings['seconds']:g} seconds: the mixed workload, Poisson arrivals at "
        f"{first['rate']:.1f} a second, each with a deadline of {low:g} to {high:g} times what it "
        "takes alone. Nobody tries again. The rival is the same server with two changes: jobs and "
        "the rows of a pass go in the order of arrival, and no deadline is refused. What the "
        "engine can do is measured in a closed loop just before.\n\n"
        f"{_table(results)}\n\n"
        "Memory is that of the server and its engine together. Made by `make bench-overload`."
        f"{note}"
    )


def _table(results: Results) -> str:
    calls = _calls(results)
    seconds = results.settings["seconds"]
    heads = ["", *(NAMES[name] for name in calls)]
    lines: list[tuple[str, list[str]]] = [
        ("calls", [str(len(each)) for each in calls.values()]),
        (
            "images in time, a second",
            [f"{len(in_time(each, seconds)) / seconds:.2f}" for each in calls.values()],
        ),
        ("… of what the engine can do", _shares(results, calls, "images_per_second")),
        ("… counted in steps", _shares(results, calls, "steps_per_second")),
        ("refused", [_share(each, [c for c in each if c.refused]) for each in calls.values()]),
        (
            "expired",
            [_share(each, [c for c in each if c.outcome == EXPIRED]) for each in calls.values()],
        ),
        (
            "ended otherwise",
            [
                str(sum(call.outcome.startswith(MALFORMED) for call in each))
                for each in calls.values()
            ],
        ),
        ("refusals, p50 / p99 in ms", [_refusals(each) for each in calls.values()]),
        (
            "memory before / at most / after, MiB",
            [
                " / ".join(
                    f"{results.figures[name][f'memory_{when}'] / 2**20:.0f}"
                    for when in ("before", "peak", "after")
                )
                for name in calls
            ],
        ),
        ("reasons", [_reasons(each) for each in calls.values()]),
    ]
    return table(heads, [[name, *cells] for name, cells in lines])


def _calls(results: Results) -> dict[str, list[Call]]:
    return {name: [Call(*call) for call in results.figures[name]["calls"]] for name in NAMES}


def _shares(results: Results, calls: Mapping[str, Sequence[Call]], unit: str) -> list[str]:
    seconds = results.settings["seconds"]
    shares = []
    for name, each in calls.items():
        done = in_time(each, seconds)
        size = len(done) if unit == "images_per_second" else sum(call.steps for call in done)
        figures: Mapping[str, Any] = results.figures[name]
        shares.append(f"{size / seconds / figures[unit]:.0%}")
    return shares


def _share(calls: Sequence[Call], some: Sequence[Call]) -> str:
    return f"{len(some) / len(calls):.0%}"


def _refusals(calls: Sequence[Call]) -> str:
    seconds = [call.seconds * 1000 for call in calls if call.refused]
    if not seconds:
        return "–"
    return f"{quantile(seconds, 0.5):.1f} / {quantile(seconds, 0.99):.1f}"


def _reasons(calls: Sequence[Call]) -> str:
    reasons = Counter(call.outcome for call in calls if call.refused)
    return ", ".join(f"`{reason}` {count}" for reason, count in sorted(reasons.items())) or "–"
