"""``docs/benchmarks.md``, the part on starting and coming back."""

from bench.quantiles import quantile
from bench.results import Results
from bench.sections import table

ROWS = {
    "help": "`--help`",
    "answers": "start to the first answer to a health check",
    "ready": "start to READY, the demo model loaded and warmed up",
    "recovers": "engine killed (SIGKILL) to READY again",
}


def page(results: Results) -> str:
    """The section."""
    rows = [
        [
            words,
            *(f"{quantile(results.figures[name], share) * 1000:.0f}" for share in (0.0, 0.5, 1.0)),
        ]
        for name, words in ROWS.items()
    ]
    note = f"\n\n{results.note}" if results.note else ""
    return (
        "## Start and recovery\n\n"
        f"{results.date}, {results.machine.text}, {results.settings['starts']} times each, in "
        "milliseconds. Made by `python -m bench.lifecycle`.\n\n"
        f"{table(['', 'least', 'median', 'most'], rows)}{note}"
    )
