"""What `make observe` runs: a server, Prometheus, a load, and what Prometheus says of it.

Its plots go to ``docs/images``, and a section that shows them to ``docs/operations.md``.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.report.machine import this_machine
from bench.report.markdown import DOCS, write_section
from bench.report.results import today
from tools.observe.load import Seen, run_load
from tools.observe.plots import draw
from tools.observe.prometheus import RULES, Missing, Prometheus, prometheus
from tools.observe.server import server

WINDOW = "1m"
SETTLE_SECONDS = 3.0
"""For the last scrape and the rules' evaluation after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Observe a short run; exits with 1 where there is no Prometheus."""
    parser = argparse.ArgumentParser(prog="tools.observe", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load; default: 60")
    parser.add_argument("--callers", type=int, default=4, help="at once; default: 4")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the plots go")
    options = parser.parse_args(arguments)
    try:
        print("a server loads the demo model", flush=True)
        with server() as running, prometheus(running.metrics, window=WINDOW) as asked:
            print(f"Prometheus scrapes it; {options.callers} callers for {options.seconds:g} s")
            begin = time.time()
            seen = run_load(running.address, seconds=options.seconds, callers=options.callers)
            time.sleep(SETTLE_SECONDS)
            failed = ", ".join(f"{count} {name}" for name, count in sorted(seen.failed.items()))
            print(
                f"callers saw: {seen.finished} answers with {seen.images} images, "
                f"{failed or 'no failures'}\n"
            )
            tell(asked)
            paths = draw(asked, begin, time.time(), options.docs / "images")
            text = section(today(), this_machine().text, options.callers, seen, paths)
            print(write_section("operations.md", "Operations", "observe", text, options.docs))
    except Missing as error:
        sys.exit(str(error))


def section(date: str, machine: str, callers: int, seen: Seen, paths: Sequence[Path]) -> str:
    """What the page shows of the run."""
    pictures = "\n\n".join(f"![{path.stem}](images/{path.name})" for path in paths)
    return (
        f"A run of `make observe`: {date}, {machine}, the demo model, {callers} callers of mixed "
        f"wishes, {seen.images} images.\n\n{pictures}"
    )


def tell(asked: Prometheus) -> None:
    """Print what Prometheus answers for each recording rule, and the alerts that ring."""
    print(f"the recording rules of deploy/prometheus, over {WINDOW} instead of 5m:")
    for path in sorted(RULES.glob("*.rules.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                _tell_rule(asked, rule["record"])
    firing = asked.query('ALERTS{alertstate="firing"}')
    names = [dict(labels)["alertname"] for labels in firing]
    print(f"alerts that ring: {', '.join(names) or 'none'}\n")


def _tell_rule(asked: Prometheus, name: str) -> None:
    answers = asked.query(name)
    if not answers:
        print(f"  {name}  (nothing happened)")
    for labels, value in answers.items():
        text = ", ".join(f"{key}={value}" for key, value in labels)
        print(f"  {name}{{{text}}}  {value:.4g}")


if __name__ == "__main__":
    main()
