"""``docs/benchmarks.md``, the part on the process boundary."""

from bench.quantiles import bootstrap_median, quantile
from bench.results import Results


def page(results: Results) -> str:
    """The section."""
    pairs = results.figures["lone"]
    ratio = bootstrap_median([pair["process"] / pair["thread"] for pair in pairs])
    thread, process = (
        quantile([pair[name] for pair in pairs], 0.5) * 1000 for name in ("thread", "process")
    )
    micros = [seconds * 1e6 for seconds in results.figures["crossings"]]
    note = f"\n\n{results.note}" if results.note else ""
    return (
        "## The process boundary\n\n"
        f"{results.date}, {results.machine.text}. A lone request of "
        f"{results.settings['lone_steps']} steps takes {process:.1f} ms in an engine that is a "
        f"process of its own, and {thread:.1f} ms in one on a thread (medians of {len(pairs)} "
        f"interleaved pairs); median ratio {ratio.value:.3f}, 95 % interval {ratio.low:.3f} to "
        f"{ratio.high:.3f}. An image of 1 MB crosses in {quantile(micros, 0.5):.0f} µs at the "
        f"median, {quantile(micros, 0.95):.0f} µs at p95, of {len(micros)}. Made by "
        f"`python -m bench.boundary`.{note}"
    )
