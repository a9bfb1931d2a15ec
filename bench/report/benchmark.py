"""One way to declare a benchmark, to run it from a command line, and to write its section."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.report.goals import Goal, print_goals
from bench.report.machine import this_machine, versions
from bench.report.markdown import DOCS, join, provenance, write_section
from bench.report.results import RESULTS, Results, save, today


class Amount(NamedTuple):
    """How much is measured: the default, and the smallest useful value for a trial run."""

    default: Any
    quick: Any
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a benchmark found; ``settings`` are those besides its amounts.

    ``command`` among them is the one that measured, if it is not the benchmark's own.
    """

    figures: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    gpu: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark whose section is one text and some tables.

    ``measure`` gets the amounts by name, and ``model``: a pipeline folder, None for the demo model.
    ``describe`` returns the parts of the section below the line that says when and on what machine.
    ``check`` returns why the amounts or the machine do not fit, empty if they do.
    """

    name: str
    title: str
    command: str
    amounts: Mapping[str, Amount]
    measure: Callable[[argparse.Namespace], Measurement]
    describe: Callable[[Results], Sequence[str]]
    goals: Callable[[Results], Sequence[Goal]] = lambda _: ()
    check: Callable[[argparse.Namespace], str] = lambda _: ""
    page: str = "benchmarks.md"

    def section(self, results: Results) -> str:
        """The Markdown of ``results``."""
        return join(
            [
                f"## {self.title}",
                provenance(results, results.settings.get("command", self.command)),
                *self.describe(results),
                results.note,
            ]
        )

    def run(self, options: argparse.Namespace) -> Path:
        """Measure, save the results, write the section; returns the path of the results."""
        return self.publish(self.measure(options), options)

    def publish(self, found: Measurement, options: argparse.Namespace) -> Path:
        """Save what was measured, write the section; returns the path of the results."""
        amounts = {name: getattr(options, name) for name in self.amounts}
        results = Results(
            bench=self.name,
            date=today(),
            machine=this_machine(found.gpu),
            versions=versions(),
            model=found.model,
            settings=amounts | found.settings,
            figures=found.figures,
            note=options.note,
        )
        print(self.section(results), flush=True)
        path = save(results, options.results)
        print(path.name)
        write_section(self.page, self.name, self.section(results), options.docs)
        print_goals(self.goals(results))
        return path


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--note", default="", help="a sentence for the page about this run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")


def run_named(
    benchmarks: Sequence[Benchmark], prog: str, description: str, arguments: Sequence[str] | None
) -> None:
    """The command line of ``benchmarks``: runs those that it names, one after another."""
    by_name = {each.name: each for each in benchmarks}
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "names", nargs="+", choices=by_name, metavar="NAME", help=", ".join(by_name)
    )
    parser.add_argument("--model", help="a pipeline folder; default: the demo model")
    parser.add_argument(
        *("--quick", "--smoke"),
        action="store_true",
        help="the smallest amounts: a trial, not for the pages",
    )
    for name in dict.fromkeys(name for each in benchmarks for name in each.amounts):
        _add_amount(parser, name, benchmarks)
    add_output_options(parser)
    given = parser.parse_args(arguments)
    for benchmark in (by_name[name] for name in given.names):
        options = argparse.Namespace(**vars(given))
        for name, amount in benchmark.amounts.items():
            if getattr(given, name) is None:
                setattr(options, name, amount.quick if given.quick else amount.default)
        if reason := benchmark.check(options):
            parser.exit(2, f"{benchmark.name}: {reason}\n")
        benchmark.run(options)


def _add_amount(
    parser: argparse.ArgumentParser, name: str, benchmarks: Sequence[Benchmark]
) -> None:
    """One option for all benchmarks that have an amount of this name."""
    amounts = {each.name: each.amounts[name] for each in benchmarks if name in each.amounts}
    default = next(iter(amounts.values())).default
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=type(default[0] if isinstance(default, list) else default),
        nargs="+" if isinstance(default, list) else None,
        help="; ".join(
            f"{owner}: {amount.help}; default {amount.default}" for owner, amount in amounts.items()
        ),
    )
