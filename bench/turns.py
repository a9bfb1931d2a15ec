"""Whose batch is next among the sizes of a model, in simulation: ``python -m bench.turns``.

Runs requests of mixed sizes batch by batch, in a closed loop and in open ones, by the rule of
``core.order`` and by others. Prints images/s and latencies beside those of static batches, as
LitServe, Ray Serve and Triton make them; writes nothing. Only batches and decodes take time.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.peers.scenarios import CALLERS, SIDES
from bench.peers.servers.config import by_settings
from bench.report.statistics import quantile
from bench.simulate import MODEL, ROWS_PER_IMAGE, batch_times_of
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed, poisson, sized
from darkroom_server.core.order import FairShare, OrderKey, Turns, pick
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group

MAX_IMAGES = 8
"""Of a batch."""

STATIC_TIMEOUT = 0.05
"""Seconds that a static batch waits to fill: the best of those that were tried with the servers."""


@dataclass(slots=True)
class Waiting:
    """An image that is not finished."""

    request: Request
    arrival: float
    remaining: int

    def key(self) -> OrderKey:
        """For ``core.order.pick``."""
        return OrderKey(
            id=(str(self.request.index), 0),
            submitted_at=self.arrival,
            remaining_steps=self.remaining,
            rows=ROWS_PER_IMAGE,
        )


class Rule(Protocol):
    """Chooses the size of the next batch."""

    def next(self, present: Mapping[Group, Sequence[Waiting]], now: float) -> Group:
        """The group whose turn it is; ``present`` has at least one."""

    def charge(self, group: Group, seconds: float, batch: Sequence[Waiting]) -> None:
        """Count a batch of ``group``."""


class CoreOrder:
    """As the server does: a turn is a batch, and long work gets more of them."""

    def __init__(self) -> None:
        self._turns: Turns[Group] = Turns()

    def next(self, present: Mapping[Group, Sequence[Waiting]], now: float) -> Group:
        """See ``Rule``."""
        return self._turns.next(present)

    def charge(self, group: Group, seconds: float, batch: Sequence[Waiting]) -> None:
        """See ``Rule``."""
        self._turns.charge(group, seconds, max(each.request.steps for each in batch))


Cost = Callable[[float, Sequence[Waiting]], float]
"""What a batch counts, by its seconds and its images."""


class LeastCharged:
    """The group whose batches cost least so far."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._share: FairShare[Group] = FairShare()

    def next(self, present: Mapping[Group, Sequence[Waiting]], now: float) -> Group:
        """See ``Rule``."""
        return self._share.next(present)

    def charge(self, group: Group, seconds: float, batch: Sequence[Waiting]) -> None:
        """See ``Rule``."""
        self._share.charge(group, self._cost(seconds, batch))


class MostUrgent:
    """The group of the image with the lowest ``score``, whatever its group had before."""

    def __init__(self, score: Callable[[Waiting, float], float]) -> None:
        self._score = score

    def next(self, present: Mapping[Group, Sequence[Waiting]], now: float) -> Group:
        """See ``Rule``."""
        return min(present, key=lambda group: min(self._score(w, now) for w in present[group]))

    def charge(self, group: Group, seconds: float, batch: Sequence[Waiting]) -> None:
        """Nothing: see the class."""


def longest(batch: Sequence[Waiting]) -> int:
    """The most steps of an image of ``batch``."""
    return max(each.request.steps for each in batch)


def work(batch: Sequence[Waiting]) -> float:
    """Rows × pixels."""
    return sum(group_of(each.request).pixels * ROWS_PER_IMAGE for each in batch)


RULES: Mapping[str, Callable[[], Rule]] = {
    "core.order": CoreOrder,
    "equal time": lambda: LeastCharged(lambda seconds, _: seconds),
    "equal turns": lambda: LeastCharged(lambda *_: 1.0),
    "turns ~ longest^0.75": lambda: LeastCharged(lambda _, batch: longest(batch) ** -0.75),
    "turns ~ longest": lambda: LeastCharged(lambda _, batch: 1.0 / longest(batch)),
    "turns ~ rows": lambda: LeastCharged(lambda _, batch: 1.0 / len(batch)),
    "turns ~ √(rows × longest)": lambda: LeastCharged(
        lambda _, batch: 1.0 / math.sqrt(len(batch) * longest(batch))
    ),
    "turns ~ sum of √steps": lambda: LeastCharged(
        lambda _, batch: 1.0 / sum(math.sqrt(each.request.steps) for each in batch)
    ),
    "time ~ rows × pixels": lambda: LeastCharged(lambda seconds, batch: seconds / work(batch)),
    "time ~ work × √longest": lambda: LeastCharged(
        lambda seconds, batch: seconds / (work(batch) * math.sqrt(longest(batch)))
    ),
    "least attained steps": lambda: MostUrgent(
        lambda each, _: 1.0 - each.remaining / each.request.steps
    ),
    "oldest image": lambda: MostUrgent(lambda each, _: each.arrival),
    "largest age / √steps": lambda: MostUrgent(
        lambda each, now: (each.arrival - now) / math.sqrt(each.request.steps)
    ),
    "earliest goal": lambda: MostUrgent(lambda each, _: each.key().goal),
}
"""Each in turn gives the next batch to one of the sizes that wait."""


def group_of(request: Request) -> Group:
    """The images that can share a batch with ``request``'s."""
    side = MODEL.defaults
    return Group(MODEL.id, request.width or side.width, request.height or side.height)


def by_steps(
    arrivals: Arrivals, rule: Rule, times: BatchTimeModel, max_images: int = MAX_IMAGES
) -> list[Answer]:
    """The answers of an engine that chooses each batch by ``rule`` and ``core.order.pick``."""
    waiting: dict[Group, dict[str, Waiting]] = {}
    answers: list[Answer] = []
    now = 0.0
    while len(answers) < arrivals.count:
        for at, request in arrivals.until(now):
            new = Waiting(request, at, request.steps)
            waiting.setdefault(group_of(request), {})[str(request.index)] = new
        present = {group: list(images.values()) for group, images in waiting.items() if images}
        if not present:
            now = max(now, arrivals.next_at() or now)
            continue
        group = rule.next(present, now)
        keys = pick([each.key() for each in present[group]], max_images * ROWS_PER_IMAGE)
        batch = [waiting[group][key.id[0]] for key in keys]
        seconds = times.batch_seconds(group, ROWS_PER_IMAGE * len(batch))
        now += seconds
        rule.charge(group, seconds, batch)
        for each in batch:
            each.remaining -= 1
        for each in batch:
            if not each.remaining:
                now += times.decode_seconds(group)
                del waiting[group][str(each.request.index)]
                answers.append(Answer.of(each.request, each.arrival, now))
                arrivals.answered(now)
    return answers


def in_static_batches(
    arrivals: Arrivals,
    times: BatchTimeModel,
    max_images: int = MAX_IMAGES,
    timeout: float = STATIC_TIMEOUT,
) -> list[Answer]:
    """The answers of a server that makes batches of requests, first come, first served.

    A batch waits for ``timeout`` seconds to fill. Within it, equal settings share a call of
    ``pipe()``, and all answers leave when it ends.
    """
    queue: list[tuple[float, Request]] = []
    answers: list[Answer] = []
    now = 0.0
    while len(answers) < arrivals.count:
        queue += arrivals.until(now)
        if not queue:
            now = max(now, arrivals.next_at() or now)
            continue
        until = now + timeout
        while len(queue) < max_images:
            following = arrivals.next_at()
            now = until if following is None else min(until, following)
            queue += arrivals.until(now)
            if now == until:
                break
        batch, queue = queue[:max_images], queue[max_images:]
        for call in by_settings([request for _, request in batch], max_images):
            group = group_of(call[0])
            seconds = times.batch_seconds(group, ROWS_PER_IMAGE * len(call))
            now += call[0].steps * seconds + len(call) * times.decode_seconds(group)
        answers += [Answer.of(request, at, now) for at, request in batch]
        for _ in batch:
            arrivals.answered(now)
    return answers


def requests_of(count: int, seed: int) -> list[Request]:
    """Requests of mixed steps and sizes, as in the scenarios of ``bench.peers``."""
    sides = tuple(round(MODEL.defaults.width * share) for share in SIDES)
    return sized(mixed(count, seed), sides, seed)


def rate_of(answers: Sequence[Answer]) -> float:
    """Images/s."""
    return len(answers) / max(each.arrival + each.latency for each in answers)


def figures_of(answers: Sequence[Answer]) -> list[float]:
    """Images/s, p50 and p95 of all, p50 and p95 of the shortest class, p95 of the longest."""
    latencies = [each.latency for each in answers]
    steps = sorted({each.steps for each in answers})
    short, long = (
        [each.latency for each in answers if each.steps == wanted]
        for wanted in (steps[0], steps[-1])
    )
    every = [quantile(latencies, share) for share in (0.5, 0.95)]
    return [
        rate_of(answers),
        *every,
        quantile(short, 0.5),
        quantile(short, 0.95),
        quantile(long, 0.95),
    ]


def _way(rule: Callable[[], Rule], times: BatchTimeModel) -> Callable[[Arrivals], list[Answer]]:
    return lambda arrivals: by_steps(arrivals, rule(), times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each load."""
    parser = argparse.ArgumentParser(prog="bench.turns", description=__doc__)
    parser.add_argument("--count", type=int, default=160, help="requests of each loop")
    parser.add_argument("--rounds", type=int, default=10, help="their medians are printed")
    parser.add_argument("--callers", type=int, default=CALLERS, help="of the closed loop")
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=[0.9, 1.3, 1.6],
        help="of the open loops, shares of the capacity of one call at a time",
    )
    parser.add_argument(
        "--batch-times", default="2:13.4,16:37.2", help="rows:milliseconds at the default size"
    )
    parser.add_argument("--decode", type=float, default=16.0, help="milliseconds of an image")
    options = parser.parse_args(arguments)
    times = batch_times_of(options.batch_times, options.decode / 1000)
    ways: dict[str, Callable[[Arrivals], list[Answer]]] = {
        "static batches": lambda arrivals: in_static_batches(arrivals, times)
    }
    ways |= {name: _way(rule, times) for name, rule in RULES.items()}
    sets = [requests_of(options.count, seed) for seed in range(options.rounds)]
    capacity = statistics.median(
        rate_of(in_static_batches(Arrivals(each, 1), times, 1)) for each in sets
    )
    heads = ("images/s", "p50", "p95", "p50 short", "p95 short", "p95 long")
    for load in [None, *options.loads]:
        label = f"closed, {options.callers} callers" if load is None else f"Poisson {load:g}"
        print(f"{label:28}", *(f"{head:>10}" for head in heads))
        for name, way in ways.items():
            rows = [
                figures_of(
                    way(
                        Arrivals(each, options.callers)
                        if load is None
                        else Arrivals(poisson(each, load * capacity, seed))
                    )
                )
                for seed, each in enumerate(sets)
            ]
            medians = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name:28}", *(f"{each:10.2f}" for each in medians), flush=True)


if __name__ == "__main__":
    main()
