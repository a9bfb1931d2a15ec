"""A production trace with many models on one device: ``python -m bench.trace trace trace_served``.

``trace`` simulates all of it, ``trace_served`` sends parts of it to real servers. Each writes its
results to ``bench/results`` and its section of ``docs/benchmarks.md``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.peers.registry import WORK
from bench.report.benchmark import Amount, Benchmark, Measurement, run_named
from bench.report.machine import model_source
from bench.report.results import Results
from bench.trace import simulation
from bench.trace.bounds import least_loads, longest_backlog
from bench.trace.costs import LoadCosts
from bench.trace.figures import Swaps, figures_of
from bench.trace.peers.registry import PEERS
from bench.trace.policies import Policy
from bench.trace.report import goals, section_parts
from bench.trace.requests import PLACE, TraceRequest, at_load, made_up, read, slice_from
from bench.trace.simulation import Machine, simulate
from bench.workload.arrivals import Answer
from darkroom_server.core.model_runtime import ModelRuntime, ModelSpeed
from darkroom_server.logs import configure_logs
from darkroom_server.settings import Logs

ALL, BUSY, MEDIAN = "all", "busy", "median"
PARTIAL = WORK / "trace_served.json"
SIMULATED_POLICIES = [policy.value for policy in Policy]
COMPARED = [policy.value for policy in (Policy.OURS, Policy.FIRST_COME, Policy.LRU)]
SYSTEMS = [*COMPARED, *PEERS]
"""Our server with each policy, and the others."""

STEPS = 30
"""Of nine requests in ten; a lone request of another number is taken to last in proportion."""

WINDOWS = (0.0, 4.0, 15.0, 30.0)
"""Seconds within which requests may be exchanged, for the fewest loads that are possible."""

MAY_DIFFER = {"trace", "loads", "policies", "parts", "resume"}
"""Amounts of which runs may be added to earlier ones."""

COMMON = {
    "trace": Amount("", "", f"path of the trace; default {PLACE.name} in ../shared/data, if there"),
    "loads": Amount([0.7, 0.9], [0.9], "shares of what one resident model can do"),
    "policies": Amount(SIMULATED_POLICIES, SIMULATED_POLICIES, ", ".join(Policy)),
    "swap_wait": Amount(30.0, 30.0, "the server's setting, in seconds"),
    "load_scale": Amount(1.0, 1.0, "times the loads of SDXL"),
    "device_models": Amount(4, 4, "models that the device holds"),
    "host_models": Amount(20, 20, "models that the host's memory holds"),
}


def requests_of(path: str) -> tuple[list[TraceRequest], bool]:
    """The trace in ``path`` or in its usual place, else a made-up one; and which it is."""
    if path:
        return read(Path(path)), True
    if PLACE.exists():
        return read(PLACE), True
    return made_up(), False


def part_of(requests: Sequence[TraceRequest], name: str, count: int) -> list[TraceRequest]:
    """``count`` requests of the trace, or all."""
    if name == ALL and count <= 0:
        return list(requests)
    return slice_from(requests, busy=name != MEDIAN, count=count)


def machine_of(options: argparse.Namespace) -> Machine:
    """What the options say is simulated."""
    pairs = (pair.split(":") for pair in options.batch_times.split(","))
    passes = tuple((int(rows), float(milliseconds) / 1000) for rows, milliseconds in pairs)
    return Machine(
        speed=ModelSpeed(passes=passes, decode=options.decode / 1000),
        max_rows=max(rows for rows, _ in passes),
        device_models=options.device_models,
        host_models=options.host_models,
        swap_wait=options.swap_wait,
        load_scale=options.load_scale,
    )


def measure_simulated(options: argparse.Namespace) -> Measurement:
    """Every policy at every load, in virtual time."""
    trace, is_real = requests_of(options.trace)
    machine = machine_of(options)
    requests = part_of(trace, ALL, options.requests)
    kinds = {(r.steps, r.images): r for r in requests}
    lone = {kind: simulation.alone(machine, request) for kind, request in kinds.items()}
    alone = {r.index: lone[r.steps, r.images] for r in requests}
    capacity = simulation.steps_per_second(requests, alone)
    runs, bounds = [], []
    for load in options.loads:
        arriving = at_load(requests, load * capacity)
        bounds.append(_bounds(load, arriving, machine, alone))
        for policy in map(Policy, options.policies):
            found = simulate(arriving, machine, policy).figures(alone)
            runs.append(_run(ALL, load, policy.value, found, max(lone.values()), options))
            print(f"{runs[-1]['slice']}, {load:g}, {policy}: {found}", flush=True)
    return Measurement(
        figures={
            "is_real_trace": is_real,
            "requests": len(requests),
            "bounds": bounds,
            "runs": runs,
        },
        model={"id": "demo", "speed": asdict(machine.speed)},
        settings=names_of_files(options),
    )


def measure_served(options: argparse.Namespace) -> Measurement:
    """Every system, part and load with a real server; what was measured before is kept."""
    # It needs Pillow and the model's files.
    from bench.inprocess.remote import MAX_BATCH_IMAGES
    from bench.peers.bench import info_of
    from bench.peers.process import versions_of
    from bench.trace.copies import write_copies
    from bench.trace.peers import serve as peers
    from bench.trace.served import config_of, measure_alone, serve_trace

    trace, is_real = requests_of(options.trace)
    parts = {name: part_of(trace, name, options.requests) for name in options.parts}
    models = sorted({r.model for requests in parts.values() for r in requests})
    folder = WORK / "trace-models"
    weight_bytes = write_copies(folder, models)
    memory = {
        name: getattr(options, name) for name in ("device_models", "host_models", "load_scale")
    }

    def config(name: str, policy: Policy) -> Any:
        return config_of(
            folder,
            name,
            policy=policy,
            weight_bytes=weight_bytes,
            swap_wait=options.swap_wait,
            **memory,
        )

    fixed = {name: getattr(options, name) for name in SERVED.amounts if name not in MAY_DIFFER}
    state: dict[str, Any] = {"fixed": fixed, "runs": []}
    if options.resume:
        state = json.loads(Path(options.resume).read_text(encoding="utf-8"))
        if state["fixed"] != fixed:
            sys.exit(f"{options.resume} was made with other amounts: {state['fixed']}")
    if "alone" not in state:
        images = sorted({r.images for requests in parts.values() for r in requests})
        state["alone"] = measure_alone(
            config("one", Policy.OURS), options.side, models[0], images, STEPS
        )
        _save(state)
    if "runtime" not in state and PEERS.keys() & options.policies:
        # All run the model as our engine does.
        state["runtime"] = asdict(info_of(model_source(None)).runtime)
    state["versions"] = state.get("versions", {}) | {
        name: versions_of(peer) for name, peer in PEERS.items() if name in options.policies
    }

    def serve(name: str, system: str, arriving: list[TraceRequest]) -> tuple[list[Answer], Swaps]:
        if system in PEERS:
            runtime = ModelRuntime(**state["runtime"])
            wanted = peers.config_of(folder, name, runtime, **memory)
            return peers.serve_trace(arriving, PEERS[system], wanted, options.side)
        return serve_trace(arriving, config(name, Policy(system)), options.side)

    lone = {int(images): seconds for images, seconds in state["alone"].items()}
    all_alone = {
        name: {r.index: lone[r.images] * r.steps / STEPS for r in requests}
        for name, requests in parts.items()
    }
    done = {(run["slice"], run["load"], run["policy"]) for run in state["runs"]}
    for name, load, system in _runs(options):
        if (name, load, system) in done:
            continue
        alone = all_alone[name]
        arriving = at_load(parts[name], load * simulation.steps_per_second(parts[name], alone))
        arriving = [r for r in arriving if r.arrival <= options.seconds]
        answers, swaps = serve(f"{name}-{load:g}", system, arriving)
        found = figures_of(answers, alone, swaps)
        longest = max(alone[r.index] for r in arriving)
        state["runs"].append(_run(name, load, system, found, longest, options))
        print(f"{name}, {load:g}, {system}: {found}", flush=True)
        _save(state)
    return Measurement(
        figures=state | {"is_real_trace": is_real},
        model={"id": "demo"},
        settings=names_of_files(options) | {"max_batch_images": MAX_BATCH_IMAGES},
    )


def names_of_files(options: argparse.Namespace) -> dict[str, str]:
    """For the results: where the files lie is of this machine only."""
    paths = {name: getattr(options, name, "") for name in ("trace", "resume")}
    return {name: Path(path).name for name, path in paths.items() if path}


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, float, str]]:
    for name in options.parts:
        for load in options.loads:
            for system in options.policies:
                yield name, load, system


def _run(
    name: str,
    load: float,
    policy: str,
    found: dict[str, Any],
    longest_run: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    longest_load = LoadCosts(options.load_scale).cost()
    return {
        "slice": name,
        "load": load,
        "policy": policy,
        "longest_load": round(longest_load, 3),
        "longest_run": round(longest_run, 3),
        **found,
    }


def _bounds(
    load: float, arriving: Sequence[TraceRequest], machine: Machine, alone: dict[int, float]
) -> dict[str, Any]:
    """See ``bounds``; in full batches each image has its share of the largest batch."""
    rows, seconds = machine.speed.passes[-1]
    share, decode = 2 * seconds / rows, machine.speed.decode
    full = ((r.arrival, r.images * (r.steps * share + decode)) for r in arriving)
    return {
        "load": load,
        "least_loads": {
            f"{window:g}": least_loads(arriving, machine.device_models, window)
            for window in WINDOWS
        },
        "backlog_alone": round(longest_backlog((r.arrival, alone[r.index]) for r in arriving), 1),
        "backlog_in_full_batches": round(longest_backlog(full), 1),
    }


def _save(state: dict[str, Any]) -> None:
    PARTIAL.parent.mkdir(parents=True, exist_ok=True)
    PARTIAL.write_text(json.dumps(state, indent=1), encoding="utf-8")


def check_simulated(options: argparse.Namespace) -> str:
    """Only policies of our own server can be simulated."""
    return _unknown(options.policies, SIMULATED_POLICIES)


def check_served(options: argparse.Namespace) -> str:
    """The servers that are measured must be installed."""
    if unknown := _unknown(options.policies, [*SIMULATED_POLICIES, *PEERS]):
        return unknown
    absent = [name for name in options.policies if name in PEERS and not PEERS[name].is_installed]
    if not absent:
        return ""
    return f"not installed: {', '.join(absent)}; `make bench-peers-setup` does it"


def _unknown(given: Sequence[str], known: Sequence[str]) -> str:
    unknown = [name for name in given if name not in known]
    if not unknown:
        return ""
    return f"no policy is called {', '.join(unknown)}; choose from {', '.join(known)}"


def describe_simulated(results: Results) -> Sequence[str]:
    """The section of the simulation."""
    return section_parts(
        results,
        f"All {results.figures['requests']} are simulated: our own dispatcher in virtual time, "
        f"with batches of {results.settings['batch_times']} (rows:milliseconds) and "
        f"{results.settings['decode']:g} ms for each decode.",
    )


def describe_served(results: Results) -> Sequence[str]:
    """The section of the real servers."""
    settings = results.settings
    return section_parts(
        results,
        f"{settings['requests']} consecutive requests from the busiest hour on and as many from a "
        f"median one, of which each run takes those of its first {settings['seconds']:g} seconds, "
        f"go to a real server over gRPC: copies of the demo model, {settings['side']}² pixels. The "
        "thread that reads a model waits for what a load is to take.",
    )


SIMULATED = Benchmark(
    name="trace",
    title="Many models: a production trace, simulated",
    command="python -m bench.trace trace",
    amounts={
        **COMMON,
        "requests": Amount(0, 150, "requests from the busiest hour on; 0: the whole trace"),
        "batch_times": Amount(
            "2:13,4:17,8:24,16:40", "2:13,4:17,8:24,16:40", "rows:milliseconds of a batch"
        ),
        "decode": Amount(5.3, 5.3, "milliseconds of an image"),
    },
    measure=measure_simulated,
    describe=describe_simulated,
    goals=goals,
    check=check_simulated,
)

SERVED = Benchmark(
    name="trace_served",
    title="Many models: a production trace, served",
    command="python -m bench.trace trace_served",
    amounts={
        **COMMON,
        "requests": Amount(1500, 12, "consecutive requests of each part"),
        "policies": Amount(SYSTEMS, COMPARED, ", ".join([*SIMULATED_POLICIES, *PEERS])),
        "parts": Amount([BUSY, MEDIAN], [BUSY], "busy and median"),
        "seconds": Amount(720.0, 30.0, "the longest time of arrivals in a run"),
        "side": Amount(64, 64, "pixels"),
        "resume": Amount("", "", f"the file of an interrupted benchmark, {PARTIAL.name}"),
    },
    measure=measure_served,
    describe=describe_served,
    goals=goals,
    check=check_served,
)

BENCHMARKS = (SIMULATED, SERVED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    run_named(BENCHMARKS, "bench.trace", __doc__, arguments)


if __name__ == "__main__":
    configure_logs(Logs(log_level="error"))
    main()
