"""The simulated trace beside a plain loop of the engine, batch by batch."""

import pytest

from bench.simulate import (
    POLICIES,
    ROWS_PER_IMAGE,
    batch_times_of,
    capacity,
    latencies,
    main,
)
from bench.workload.requests import Request, mixed, poisson
from darkroom_server.core.order import OrderKey, pick

SECONDS = {2: 0.025, 4: 0.035, 6: 0.0475, 8: 0.060}
DECODE = 0.040
BATCH_TIMES = batch_times_of("2:25,4:35,8:60", DECODE)
CORE_ORDER = POLICIES["core.order"]


def by_batches(requests: list[Request], max_rows: int) -> dict[int, float]:
    """Latencies of an engine that chooses the rows of each batch by ``core.order``."""
    due = sorted(requests, key=lambda request: request.arrival, reverse=True)
    arrival = {request.index: request.arrival for request in requests}
    steps: dict[int, int] = {}
    found: dict[int, float] = {}
    now = 0.0
    while due or steps:
        while due and due[-1].arrival <= now:
            request = due.pop()
            steps[request.index] = request.steps
        if not steps:
            now = due[-1].arrival
            continue
        keys = [
            OrderKey(
                id=(str(index), 0),
                submitted_at=arrival[index],
                remaining_steps=count,
                rows=ROWS_PER_IMAGE,
            )
            for index, count in steps.items()
        ]
        chosen = pick(keys, max_rows)
        now += SECONDS[ROWS_PER_IMAGE * len(chosen)]
        for index in (int(key.id[0]) for key in chosen):
            steps[index] -= 1
            if not steps[index]:
                del steps[index]
                now += DECODE
                found[index] = now - arrival[index]
    return found


@pytest.mark.parametrize("load", [0.5, 0.9, 1.2])
@pytest.mark.parametrize("max_rows", [2, 8])
def test_a_trace_takes_as_long_as_in_a_loop_of_batches(load: float, max_rows: int) -> None:
    requests = mixed(300, seed=1)
    trace = poisson(requests, load * capacity(BATCH_TIMES, requests), seed=1)
    found = latencies(trace, CORE_ORDER, BATCH_TIMES, max_rows=max_rows)
    expected = by_batches(trace, max_rows)
    assert found == pytest.approx(expected, rel=0.01)
    # Negative control: in another order, some request takes another time.
    other = latencies(trace, POLICIES["first come"], BATCH_TIMES, max_rows=max_rows)
    assert other != pytest.approx(expected, rel=0.01)


def test_an_urgent_arrival_displaces_a_long_job() -> None:
    long = Request(0, "", steps=40, guidance_scale=4.0, seed=0)
    short = Request(1, "", steps=2, guidance_scale=4.0, seed=0, arrival=0.1)
    found = latencies([long, short], CORE_ORDER, BATCH_TIMES, max_rows=2)
    assert found[1] == pytest.approx(2 * 0.025 + DECODE)
    in_order = latencies([long, short], POLICIES["first come"], BATCH_TIMES, max_rows=2)
    assert in_order[1] > 40 * 0.025 - 0.1


def test_two_engines_share_the_arrivals() -> None:
    requests = [Request(i, "", steps=10, guidance_scale=4.0, seed=0) for i in range(2)]
    found = latencies(requests, CORE_ORDER, BATCH_TIMES, max_rows=2, engines=2)
    assert list(found.values()) == pytest.approx([10 * 0.025 + DECODE] * 2)


def test_the_command_prints_a_line_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--arrivals", "30", "--loads", "0.9", "--max-rows", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(POLICIES)
