"""Measures Stable Diffusion 1.4's architecture on a GPU, in ten minutes: ``python -m bench.gpu``.

512×512, float16, random weights. Its phases run one after another, each in a process of its own,
and what they find is saved at once, with sections of ``docs/benchmarks.md``. If one fails, the next
ones run, and the exit status is 1. Needs CUDA.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.gpu.correctness import families, preset
from bench.gpu.faults import device_assert, out_of_memory
from bench.gpu.forms import compiled, decodes, forms, weights
from bench.gpu.forward import COMPILED, FORMS
from bench.gpu.machine import machine
from bench.gpu.memory_table import memory
from bench.gpu.phases import Phase, Plan, run_phases
from bench.gpu.report import ENGINE, PRESET, goals, section
from bench.gpu.serving import engine, load
from bench.inprocess.remote import in_fresh_process
from bench.report.benchmark import add_output_options
from bench.report.goals import print_goals
from bench.report.machine import this_machine, versions
from bench.report.markdown import versions_text, write_section
from bench.report.results import Results, save, today
from bench.report.results import load as load_results
from darkroom_server.core.engine_config import Preset

BUDGET_SECONDS = 480.0
"""Of ten minutes, in which packages are installed too."""


def phases_for(options: argparse.Namespace) -> list[Phase]:
    """Every phase of the forms in ``options``, in order; the last ones take a second run."""
    wanted = set(options.forms or FORMS)
    left_out = {"forms": wanted <= {COMPILED}, "compiled": COMPILED not in wanted}
    table = partial(memory, options.results, options.docs, options.note)
    every = [
        Phase(name="machine", seconds=10, measure=machine),
        Phase(name="weights", seconds=20, measure=weights),
        # The project's goals come first: a budget may end early.
        _engine(Preset.FAST, seconds=40),
        _engine(Preset.MAX, seconds=40),
        Phase(name="load", seconds=140, measure=load),
        _preset(Preset.FAST),
        _preset(Preset.MAX),
        Phase(name="forms", seconds=30, measure=forms),
        Phase(name="decodes", seconds=10, measure=decodes),
        Phase(name="out of memory", seconds=15, measure=out_of_memory),
        Phase(name="device assert", seconds=25, measure=device_assert),
        _preset(Preset.FRUGAL),
        _preset(Preset.TINY),
        Phase(name="families", seconds=45, measure=families),
        _engine(Preset.FRUGAL, seconds=60),
        Phase(name="memory", seconds=120, measure=table),
        Phase(name="compiled", seconds=60, measure=compiled),
        # Two compiles first.
        Phase(
            name=f"{ENGINE}{Preset.MAX}, compiled",
            seconds=240,
            measure=partial(engine, Preset.MAX, compiled=True),
        ),
    ]
    return [phase for phase in every if not left_out.get(phase.name)]


def _preset(name: Preset) -> Phase:
    return Phase(name=f"{PRESET}{name}", seconds=20, measure=partial(preset, name))


def _engine(name: Preset, seconds: float) -> Phase:
    return Phase(name=f"{ENGINE}{name}", seconds=seconds, measure=partial(engine, name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results and the sections whenever a phase has found something."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    usual = Plan()
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        metavar="SECONDS",
        help="for all phases; one that takes longer than remains is skipped",
    )
    parser.add_argument("--phases", nargs="+", metavar="PHASE", help="only these, as 'engine fast'")
    parser.add_argument("--resume", type=Path, metavar="RESULTS", help="run what is not done there")
    parser.add_argument("--rows", type=int, nargs="+", default=usual.rows, help="of forward passes")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=usual.forms, metavar="FORM")
    parser.add_argument("--arrivals", type=int, default=usual.arrivals, help="of the open loop")
    parser.add_argument(
        "--closed", type=int, default=usual.closed, help="requests of each closed loop"
    )
    parser.add_argument(
        "--pairs", type=int, default=usual.pairs, help="lone requests beside pipe()"
    )
    parser.add_argument(
        "--images", type=int, default=usual.images, help="of each setting in the memory table"
    )
    parser.add_argument("--seed", type=int, default=usual.seed)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    every = phases_for(options)
    names = options.phases or [phase.name for phase in every]
    if unknown := sorted(set(names) - {phase.name for phase in every}):
        known = ", ".join(repr(phase.name) for phase in every)
        parser.error(f"no phase {', '.join(map(repr, unknown))}; there are {known}")
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device; there is none", file=sys.stderr)
        sys.exit(2)
    plan = replace(
        usual,
        rows=tuple(options.rows),
        forms=tuple(options.forms),
        arrivals=options.arrivals,
        closed=options.closed,
        pairs=options.pairs,
        images=options.images,
        seed=options.seed,
    )
    results = _new_results(options)
    if options.resume:
        earlier = load_results(options.resume)
        if _origin(earlier) != _origin(results):
            parser.error(
                f"--resume: {options.resume.name} is {_origin(earlier)}; this is {_origin(results)}"
            )
        results = earlier
    ok = run_phases(
        [phase for phase in every if phase.name in names],
        plan,
        results,
        budget=options.budget,
        save=partial(_write, options),
    )
    print_goals(goals(results))
    sys.exit(0 if ok else 1)


def _new_results(options: argparse.Namespace) -> Results:
    return Results(
        bench="gpu",
        date=today(),
        # In another process: this one leaves nothing on the device.
        machine=this_machine(in_fresh_process(torch.cuda.get_device_name)),
        versions=versions(),
        model={"id": "sd14"},
        settings={"budget": options.budget},
        figures={},
        note=options.note,
    )


def _origin(results: Results) -> str:
    """What figures in one file have in common."""
    made_with = f"{results.machine.text}; {versions_text(results.versions)}"
    return f"of bench {results.bench} on {made_with}"


def _write(options: argparse.Namespace, results: Results) -> None:
    save(results, options.results)
    try:
        write_section("benchmarks.md", "gpu", section(results), options.docs)
    except Exception as error:  # noqa: BLE001 - the results are saved, and further phases run.
        print(f"the page was not written: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
