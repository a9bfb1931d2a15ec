"""Whether it pays that a batch waits for company, in simulation: ``python -m bench.hold``.

A batch of fewer rows than it may have can wait for the next arrival, for a bounded time, when work
begins or after an image ended. Prints images/s and latencies beside those of batches that never
wait; writes nothing. Nothing but batches, decodes and the way of a reply to its
caller takes time.
"""

import argparse
import csv
import gzip
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from bench.report.statistics import quantile
from bench.simulate import MODEL, ROWS_PER_IMAGE, batch_times_of
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed, poisson, uniform, with_images
from darkroom_server.core.order import OrderKey, pick
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group

MEMORY_SECONDS = 60.0
"""Of the arrivals that a rule looks at. If no two requests were there at once in that time, nothing
waits: a lone caller gains nothing."""

Wait = Callable[[int, float], float]
"""Takes the rows of a batch and the requests per second; returns the seconds that it waits."""


def never(rows: int, rate: float) -> float:
    """As the server does."""
    return 0.0


def up_to(seconds: float) -> Wait:
    """Always ``seconds``."""
    return lambda rows, rate: seconds


def if_it_pays(seconds: float, batch_seconds: Callable[[int], float]) -> Wait:
    """``seconds`` if they are expected to save more than they cost.

    A request that arrives meanwhile shares one step more, which saves ``alone + now - together``.
    By a Poisson process of ``rate`` it does with the probability 1 - exp(-rate * seconds), and the
    device is idle for that probability / rate on average. So the bound does not matter.
    """

    def wait(rows: int, rate: float) -> float:
        together = batch_seconds(rows + ROWS_PER_IMAGE)
        saved = batch_seconds(ROWS_PER_IMAGE) + batch_seconds(rows) - together
        return seconds if rate * saved > 1.0 else 0.0

    return wait


class Engine:
    """Runs requests batch by batch, in ``core.order``; ``waited`` are its idle seconds with work.

    A reply takes ``reply`` seconds to its caller and back.
    """

    def __init__(
        self, times: BatchTimeModel, *, max_rows: int, wait: Wait, reply: float = 0.0
    ) -> None:
        self._times = times
        self._max_rows = max_rows
        self._wait = wait
        self._reply = reply
        self.waited = 0.0

    def serve(self, requests: Sequence[Request], callers: int | None = None) -> list[Answer]:
        """The answers to ``requests``, as ``Arrivals`` sends them."""
        arrivals = Arrivals(requests, callers)
        recent: deque[float] = deque()
        arrived: dict[int, tuple[float, Request]] = {}
        steps: dict[tuple[int, int], int] = {}
        answers: list[Answer] = []
        now, may_wait, last_company = 0.0, True, -MEMORY_SECONDS

        def receive() -> None:
            for at, request in arrivals.until(now):
                recent.append(at)
                arrived[request.index] = at, request
                steps.update({(request.index, i): request.steps for i in range(request.images)})

        while len(answers) < arrivals.count:
            receive()
            if not steps:
                now = max(now, arrivals.next_at() or now)
                may_wait = True
                continue
            chosen = self._pick(steps, arrived)
            rows = ROWS_PER_IMAGE * len(chosen)
            if len(arrived) > 1:
                last_company = now
            has_company = now - last_company < MEMORY_SECONDS
            while recent and recent[0] < now - MEMORY_SECONDS:
                recent.popleft()
            if may_wait and has_company and rows + ROWS_PER_IMAGE <= self._max_rows:
                rate = len(recent) / min(MEMORY_SECONDS, max(now, 1.0))
                began, until = now, now + self._wait(rows, rate)
                while rows + ROWS_PER_IMAGE <= self._max_rows:
                    following = arrivals.next_at()
                    if following is None or following > until:
                        now = until
                        break
                    now = following
                    receive()
                    chosen = self._pick(steps, arrived)
                    rows = ROWS_PER_IMAGE * len(chosen)
                self.waited += now - began
            now += self.batch_seconds(rows)
            may_wait = False
            for image in chosen:
                steps[image] -= 1
                if steps[image]:
                    continue
                del steps[image]
                may_wait = True
                now += self._times.decode_seconds(GROUP)
                index = image[0]
                if not any((index, i) in steps for i in range(arrived[index][1].images)):
                    at, request = arrived.pop(index)
                    answers.append(Answer.of(request, at, now + self._reply))
                    arrivals.answered(now + self._reply)
        return answers

    def batch_seconds(self, rows: int) -> float:
        """Seconds of a batch."""
        return self._times.batch_seconds(GROUP, rows)

    def _pick(
        self, steps: dict[tuple[int, int], int], arrived: dict[int, tuple[float, Request]]
    ) -> list[tuple[int, int]]:
        keys = [
            OrderKey(
                id=(str(index), i),
                submitted_at=arrived[index][0],
                remaining_steps=count,
                rows=ROWS_PER_IMAGE,
            )
            for (index, i), count in steps.items()
        ]
        return [(int(key.id[0]), key.id[1]) for key in pick(keys, self._max_rows)]


GROUP = Group(MODEL.id, MODEL.defaults.width, MODEL.defaults.height)


def of_trace(path: Path, count: int) -> list[Request]:
    """The first ``count`` images from text of a trace, at the moments of the trace.

    ``path`` is a ``.csv.gz`` with the columns of Alibaba's ``lora_request_trace.csv`` (GenTD26).
    """
    found: list[Request] = []
    first: datetime | None = None
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row["predict_type"] != "TXT_2_IMG" or len(found) == count:
                continue
            at = datetime.fromisoformat(row["gmt_create"])
            first = first or at
            found.append(
                Request(
                    index=len(found),
                    prompt="",
                    steps=int(float(row["num_inference_steps"])),
                    guidance_scale=7.5,
                    seed=0,
                    arrival=(at - first).total_seconds(),
                    images=int(float(row["num_images_per_prompt"])),
                )
            )
    return found


def at_rate(requests: Sequence[Request], images_per_second: float) -> list[Request]:
    """``requests`` with their time scaled: on average they ask for ``images_per_second``."""
    images = sum(request.images for request in requests)
    factor = images / images_per_second / requests[-1].arrival
    return [replace(request, arrival=request.arrival * factor) for request in requests]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each load."""
    parser = argparse.ArgumentParser(prog="bench.hold", description=__doc__)
    parser.add_argument("--arrivals", type=int, default=2000, help="of each loop")
    parser.add_argument("--trace", type=Path, help="a trace of requests, lora_request_trace.csv.gz")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--waits", type=float, nargs="+", default=[5, 10, 20, 50], metavar="MS")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument(
        "--batch-times", default="2:13,4:17,8:24,16:40", help="rows:milliseconds of a batch"
    )
    parser.add_argument("--decode", type=float, default=5.3, help="milliseconds of an image")
    parser.add_argument(
        "--reply", type=float, default=8.0, help="milliseconds to a caller and back"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    times = batch_times_of(options.batch_times, options.decode / 1000)
    requests = uniform(mixed(options.arrivals, options.seed), 30, 7.5)
    several = with_images(requests, options.seed)

    def engine(wait: Wait) -> Engine:
        return Engine(times, max_rows=options.max_rows, wait=wait, reply=options.reply / 1000)

    def policies() -> dict[str, Wait]:
        longest = max(options.waits) / 1000
        seconds = engine(never).batch_seconds
        return {
            "never": never,
            **{f"up to {each:g} ms": up_to(each / 1000) for each in options.waits},
            "if it pays": if_it_pays(longest, seconds),
        }

    def images_per_second(answers: Sequence[Answer]) -> float:
        end = max(each.arrival + each.latency for each in answers)
        return sum(each.images for each in answers) / end

    heads = ("images/s", "p50", "p95", "waited")
    print(f"{'':44}", *(f"{head:>10}" for head in heads))

    def show(name: str, wanted: Sequence[Request], callers: int | None) -> None:
        for policy, wait in policies().items():
            one = engine(wait)
            answers = one.serve(wanted, callers)
            latencies = [each.latency for each in answers]
            end = max(each.arrival + each.latency for each in answers)
            figures = (
                images_per_second(answers),
                quantile(latencies, 0.5),
                quantile(latencies, 0.95),
                one.waited / end,
            )
            print(f"{name + ', ' + policy:44}", *(f"{f:10.3f}" for f in figures), flush=True)

    for callers in options.callers:
        show(f"closed, {callers} callers, one image", requests, callers)
        show(f"closed, {callers} callers, the trace's", several, callers)
    capacity = images_per_second(engine(never).serve(several, max(options.callers)))
    mean = sum(request.images for request in several) / len(several)
    for load in options.loads:
        show(f"Poisson {load:g}", poisson(several, load * capacity / mean, options.seed), None)
        if options.trace is not None:
            wanted = of_trace(options.trace, options.arrivals)
            show(f"trace {load:g}", at_rate(wanted, load * capacity), None)


if __name__ == "__main__":
    main()
