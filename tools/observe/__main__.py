"""Runs a server, Prometheus and a short load, and shows what Prometheus measured.

`make observe` runs it. Writes plots and a page to ``observe-output``; with ``--docs``, plots to
``docs/images`` and a section to ``docs/operations.md``.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.report.machine import this_machine
from bench.report.markdown import DOCS, write_section
from bench.report.results import ROOT, today
from tools.observe.load import Received, run_load
from tools.observe.plots import plot
from tools.observe.prometheus import RULES, Missing, Prometheus, prometheus
from tools.observe.server import server

OUTPUT = ROOT / "observe-output"
WINDOW = "1m"
SETTLE_SECONDS = 3.0
"""For the last scrape, and the evaluation of the rules after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Observe a short run; exits with 1 if Prometheus is not installed."""
    parser = argparse.ArgumentParser(prog="tools.observe", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load; default: 60")
    parser.add_argument("--callers", type=int, default=4, help="at once; default: 4")
    parser.add_argument("--docs", action="store_true", help="write into docs/, not observe-output/")
    options = parser.parse_args(arguments)
    folder, page = (DOCS, "operations.md") if options.docs else (OUTPUT, "observe.md")
    try:
        print("a server loads the demo model", flush=True)
        with server() as running, prometheus(running.metrics, window=WINDOW) as scraped:
            print(f"Prometheus scrapes it; {options.callers} callers for {options.seconds:g} s")
            begin = time.time()
            received = run_load(running.address, seconds=options.seconds, callers=options.callers)
            time.sleep(SETTLE_SECONDS)
            failed = ", ".join(f"{count} {name}" for name, count in sorted(received.failed.items()))
            print(
                f"callers received: {received.finished} answers with {received.images} images, "
                f"{failed or 'no failures'}\n"
            )
            print_rules(scraped)
            paths = plot(scraped, begin, time.time(), folder / "images")
            text = section(today(), this_machine().text, options.callers, received, paths)
            print(write_section(page, "observe", text, folder))
    except Missing as error:
        sys.exit(str(error))


def section(
    date: str, machine: str, callers: int, received: Received, paths: Sequence[Path]
) -> str:
    """The Markdown that shows the run."""
    pictures = "\n\n".join(f"![{path.stem}](images/{path.name})" for path in paths)
    return (
        f"A run of `make observe`: {date}, {machine}, the demo model, {callers} callers with mixed "
        f"requests, {received.images} images.\n\n{pictures}"
    )


def print_rules(scraped: Prometheus) -> None:
    """Print the value of each recording rule, and the alerts that fire."""
    print(f"the recording rules of deploy/prometheus, over {WINDOW} instead of 5m:")
    for path in sorted(RULES.glob("*.rules.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                _print_rule(scraped, rule["record"])
    firing = scraped.query('ALERTS{alertstate="firing"}')
    names = [dict(labels)["alertname"] for labels in firing]
    print(f"alerts that fire: {', '.join(names) or 'none'}\n")


def _print_rule(scraped: Prometheus, name: str) -> None:
    answers = scraped.query(name)
    if not answers:
        print(f"  {name}  (no value)")
    for labels, value in answers.items():
        text = ", ".join(f"{key}={value}" for key, value in labels)
        print(f"  {name}{{{text}}}  {value:.4g}")


if __name__ == "__main__":
    main()
