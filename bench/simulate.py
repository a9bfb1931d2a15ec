"""Compares orders and pass widths in simulation: ``python -m bench.simulate``.

Prints, for each policy, the ratios that ``bench.goals`` names; nothing is written.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from bench import policies
from bench.arrivals import Arrivals, Drawn
from bench.goals import latency_goals, throughput_goals
from bench.policies import Policy, seconds_per_step
from bench.simulation import Machine, simulate_batches, simulate_loop
from bench.workload import Request, mixed, poisson

MOST = 8
CALLERS = 8
LOADS = (0.7, 0.9)

Contender = Callable[[Arrivals], list[Drawn]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy under the patience of ``seconds`` a step, None for today's."""

    name: str
    policy: Policy
    seconds: float | None = None

    def patience(self) -> AbstractContextManager[None]:
        """The context to run it in."""
        return nullcontext() if self.seconds is None else seconds_per_step(self.seconds)


def candidates(machine: Machine) -> list[Candidate]:
    """Today's policy, its constants varied, and the other ideas."""
    found = [Candidate(f"{MOST} wide, as it is", policies.wide(MOST))]
    found += [
        Candidate(f"{images} wide, {seconds} s a step", policies.wide(images), seconds)
        for images in (2, 4, 8)
        for seconds in (0.0, 0.05, 0.25, 1.0)
    ]
    found += [
        Candidate("3 wide below 6 residents", policies.narrow_below(6, 3, MOST)),
        Candidate("1 wide for the last 8 steps", policies.narrow_for_short(8, 1, MOST)),
        Candidate("3 wide for the last 8 steps", policies.narrow_for_short(8, 3, MOST)),
        Candidate("goals within 2 s", policies.near(2.0, MOST)),
        Candidate("goals within 8 s", policies.near(8.0, MOST)),
        Candidate("greedy, power 0.25", policies.greedy(0.25, machine.pass_seconds, MOST)),
        Candidate("greedy, power 1", policies.greedy(1.0, machine.pass_seconds, MOST)),
    ]
    return found


def images_per_second(contender: Contender, requests: Sequence[Request]) -> float:
    """In a closed loop of ``CALLERS``, while all of them are there."""
    drawn = contender(Arrivals(requests, CALLERS))
    busy = max(each.arrival for each in drawn)
    return sum(each.arrival + each.latency <= busy for each in drawn) / busy


def open_loop(contender: Contender, traces: Sequence[Sequence[Request]]) -> list[Drawn]:
    """What ``contender`` drew of each trace, pooled."""
    return [each for trace in traces for each in contender(Arrivals(trace))]


def machine_of(passes: str, decode: float) -> Machine:
    """A machine of flags: ``passes`` as "1:25,2:35", ``decode``, both in milliseconds."""
    pairs = (pair.split(":") for pair in passes.split(","))
    return Machine({int(n): float(ms) / 1000 for n, ms in pairs}, decode / 1000)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.simulate", description=__doc__)
    parser.add_argument("--arrivals", type=int, default=3000, help="per trace")
    parser.add_argument("--traces", type=int, default=2, help="per load")
    parser.add_argument(
        "--passes", default="1:25,2:35,4:60,8:106", help="images:milliseconds of a pass"
    )
    parser.add_argument("--decode", type=float, default=40.0, help="milliseconds of an image")
    options = parser.parse_args(arguments)
    machine = machine_of(options.passes, options.decode)
    crowd = mixed(options.arrivals, 0)
    rate = machine.capacity(crowd)
    traces = {
        load: [
            poisson(mixed(options.arrivals, seed), load * rate, seed)
            for seed in range(options.traces)
        ]
        for load in LOADS
    }
    rivals: dict[str, Contender] = {
        "serial": lambda arrivals: simulate_batches(arrivals, machine, 1),
        "static": lambda arrivals: simulate_batches(arrivals, machine, MOST),
    }
    closed = {name: images_per_second(rival, crowd) for name, rival in rivals.items()}
    opened = {
        load: {name: open_loop(rival, traces[load]) for name, rival in rivals.items()}
        for load in LOADS
    }
    print(f"one call at a time {closed['serial']:.2f}, static {closed['static']:.2f} images/s")
    heads = [f"{head} at {load}" for load in LOADS for head in ("8-step p50", "p95", "40-step p95")]
    print(f"{'policy':28}", *(f"{head:>17}" for head in ("x serial", "x static", *heads)))
    for candidate in candidates(machine):

        def loop(arrivals: Arrivals, policy: Policy = candidate.policy) -> list[Drawn]:
            return simulate_loop(arrivals, machine, policy)

        with candidate.patience():
            goals = throughput_goals({**closed, "engine": images_per_second(loop, crowd)})
            for load in LOADS:
                goals += latency_goals({**opened[load], "engine": open_loop(loop, traces[load])})
        print(f"{candidate.name:28}", *(f"{goal.reached:17.2f}" for goal in goals), flush=True)


if __name__ == "__main__":
    main()
