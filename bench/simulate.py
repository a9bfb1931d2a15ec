"""Tries orders and batch sizes on a trace, in simulation: ``python -m bench.simulate``.

It runs the dispatcher's own simulation of the queue and the batches. Prints, for each policy, the
throughput and the latencies; writes nothing.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.report.statistics import quantile
from bench.workload.requests import Request, mixed, poisson
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.core.order import OrderKey
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork
from darkroom_server.dispatch.estimation.simulation import Load, simulate_queue

ROWS_PER_IMAGE = 2
MODEL = fake_model()
"""The batch times are those of its default size."""

MAX_RESIDENT_SAMPLES = 64


class FirstCome(RemainingWork):
    """A job whose goal is its arrival."""

    def goal(self, calls: int) -> float:
        """The moment of submission."""
        return self.key.submitted_at


class ShortestFirst(RemainingWork):
    """A job whose goal is the work that remains of an image, whenever it arrived."""

    def goal(self, calls: int) -> float:
        """The number of remaining calls."""
        return float(calls)


POLICIES: dict[str, type[RemainingWork]] = {
    "core.order": RemainingWork,
    "first come": FirstCome,
    "shortest first": ShortestFirst,
}
"""Subclasses of the simulated job, each with another ``goal``."""


def latencies(
    requests: Iterable[Request],
    policy: type[RemainingWork],
    batch_times: BatchTimeModel,
    *,
    max_rows: int,
    engines: int = 1,
) -> dict[int, float]:
    """Seconds from the arrival to the image, by the index of the request."""
    by_id = {str(request.index): request for request in requests}
    works = [_work(id, request, policy) for id, request in by_id.items()]
    load = Load(batch_times=batch_times, max_rows=lambda _: max_rows, jobs=())
    forecast = simulate_queue(
        [load] * engines, [], MAX_RESIDENT_SAMPLES, arrivals=works, max_images=math.inf
    )
    return {r.index: forecast.finishes[id] - r.arrival for id, r in by_id.items()}


def batch_times_of(text: str, decode: float) -> BatchTimeModel:
    """A model of ``text`` such as "2:25,4:35" (rows:milliseconds) and ``decode`` in seconds."""
    pairs = (pair.split(":") for pair in text.split(","))
    passes = tuple((int(rows), float(milliseconds) / 1000) for rows, milliseconds in pairs)
    model = BatchTimeModel()
    model.start(replace(MODEL, speed=ModelSpeed(passes=passes, decode=decode)))
    return model


def capacity(batch_times: BatchTimeModel, requests: Sequence[Request]) -> float:
    """Images/s of one request after another."""
    group = _group(None, None)
    step = batch_times.batch_seconds(group, ROWS_PER_IMAGE)
    decode = batch_times.decode_seconds(group)
    return len(requests) / sum(request.steps * step + decode for request in requests)


def _group(width: int | None, height: int | None) -> Group:
    return Group(MODEL.id, width or MODEL.defaults.width, height or MODEL.defaults.height)


def _work(id: str, request: Request, policy: type[RemainingWork]) -> RemainingWork:
    deadline = None if request.deadline is None else request.arrival + request.deadline
    return policy(
        id=id,
        group=_group(request.width, request.height),
        key=OrderKey(
            id=(id, 0),
            submitted_at=request.arrival,
            remaining_steps=request.steps,
            deadline=deadline,
            rows=ROWS_PER_IMAGE,
        ),
        calls=(request.steps,),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of the policies."""
    parser = argparse.ArgumentParser(prog="bench.simulate", description=__doc__)
    parser.add_argument("--arrivals", type=int, default=3000, help="Poisson arrivals of the trace")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="+",
        default=[0.7, 0.9, 1.5],
        help="shares of the serial capacity",
    )
    parser.add_argument("--max-rows", type=int, nargs="+", default=[2, 8, 16], help="of a batch")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-times", default="2:25,4:35,8:60,16:106", help="rows:milliseconds of a batch"
    )
    parser.add_argument("--decode", type=float, default=40.0, help="milliseconds of an image")
    options = parser.parse_args(arguments)
    batch_times = batch_times_of(options.batch_times, options.decode / 1000)
    requests = mixed(options.arrivals, options.seed)
    serial = capacity(batch_times, requests) * options.engines
    heads = ("images/s", "p50", "p95", "p50 8 steps", "p95 40 steps")
    print(f"{'policy':36}", *(f"{head:>12}" for head in heads))
    for load in options.loads:
        trace = poisson(requests, load * serial, options.seed)
        for max_rows in options.max_rows:
            for name, policy in POLICIES.items():
                found = latencies(
                    trace, policy, batch_times, max_rows=max_rows, engines=options.engines
                )
                end = max(r.arrival + found[r.index] for r in trace)
                short, long = (
                    [found[r.index] for r in trace if r.steps == steps] or [math.nan]
                    for steps in (8, 40)
                )
                every = list(found.values())
                figures = (
                    len(trace) / end,
                    quantile(every, 0.5),
                    quantile(every, 0.95),
                    quantile(short, 0.5),
                    quantile(long, 0.95),
                )
                label = f"{name}, {max_rows} rows, load {load:g}"
                print(f"{label:36}", *(f"{figure:12.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
