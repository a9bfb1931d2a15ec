"""``docs/benchmarks.md``, the part on what the metrics cost."""

from bench.results import Results

GOAL = 0.005
"""Of a step."""


def page(results: Results) -> str:
    """The section."""
    parts, step = results.figures["of_a_step"], results.figures["step"]
    total = sum(parts.values())
    verdict = "under" if total / step < GOAL else "over"
    note = f"\n\n{results.note}" if results.note else ""
    return (
        "## What the metrics cost\n\n"
        f"{results.date}, {results.machine.text}. A step costs {total:.1f} µs of metrics: "
        f"{parts['engine']:.1f} in the engine's process, {parts['crossing']:.1f} on the way and "
        f"{parts['serving']:.1f} in the serving process. That is {total / step:.2%} of a step of "
        f"a lone request, {step / 1000:.1f} ms, and {verdict} the goal of {GOAL:.1%}. A request "
        f"costs {results.figures['of_a_request']:.1f} µs besides. The fastest of "
        f"{results.settings['rounds']} rounds of {results.settings['times']} calls each. Once a "
        "minute (on a GPU: once a second) the engine measures the peak of a pass as well, which is "
        "left out. Made by "
        f"`python -m bench.metrics_cost`.{note}"
    )
