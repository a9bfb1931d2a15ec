"""The simulation of the sizes of a model, which take turns."""

import statistics
from dataclasses import replace

import pytest

from bench.hold import Engine, never
from bench.report.statistics import quantile
from bench.simulate import batch_times_of
from bench.turns import (
    RULES,
    MostUrgent,
    Rule,
    by_steps,
    in_static_batches,
    main,
    requests_of,
)
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed

CALLERS = 8
TIMES = batch_times_of("2:13.4,16:37.2", 0.016)
"""As batches of the demo model took on 2 cores."""


def by_rule(name: str, requests: list[Request], callers: int | None = CALLERS) -> list[Answer]:
    return by_steps(Arrivals(requests, callers), RULES[name](), TIMES)


def p95_of_long(answers: list[Answer]) -> float:
    return quantile([each.latency for each in answers if each.steps == 40], 0.95)


@pytest.fixture(scope="module")
def against_static() -> dict[str, list[float]]:
    """The p95 of 40 steps by rule, in a closed loop of mixed sizes; over that of static batches."""
    found: dict[str, list[float]] = {}
    for seed in range(6):
        requests = requests_of(160, seed)
        static = p95_of_long(in_static_batches(Arrivals(requests, CALLERS), TIMES))
        for name in ("core.order", "equal time"):
            found.setdefault(name, []).append(p95_of_long(by_rule(name, requests)) / static)
    return found


def test_long_images_do_not_wait_for_those_of_other_sizes(
    against_static: dict[str, list[float]],
) -> None:
    assert statistics.median(against_static["core.order"]) <= 1.1
    # Negative control: large images take few steps a second if each size has the same seconds.
    assert min(against_static["equal time"]) > 1.5


def test_a_large_image_goes_on_beside_any_number_of_short_small_ones() -> None:
    one = Request(0, "", steps=40, guidance_scale=4.0, seed=0, width=96, height=96)
    requests = [one, *(replace(one, index=i, steps=8, width=48, height=48) for i in range(1, 200))]

    def share_of_the_run(rule: Rule) -> float:
        """When the large image ends."""
        answers = by_steps(Arrivals(requests, CALLERS), rule, TIMES)
        ends = {each.index: each.arrival + each.latency for each in answers}
        return ends[0] / max(ends.values())

    assert share_of_the_run(RULES["core.order"]()) < 0.3
    # Negative control: a rule by which it starves until the small ones end.
    assert share_of_the_run(MostUrgent(lambda each, _: each.remaining)) == 1.0


def test_with_one_size_it_is_the_simulation_of_batches_that_do_not_wait() -> None:
    requests = mixed(60, seed=2)
    times = batch_times_of("2:25,4:35,8:60", 0.040)
    expected = Engine(times, max_rows=8, wait=never).serve(requests, CALLERS)
    latencies = {each.index: each.latency for each in expected}
    for rule in RULES.values():
        found = by_steps(Arrivals(requests, CALLERS), rule(), times, max_images=4)
        assert {each.index: each.latency for each in found} == pytest.approx(latencies)
    narrower = by_steps(Arrivals(requests, CALLERS), RULES["core.order"](), times, max_images=2)
    assert {each.index: each.latency for each in narrower} != pytest.approx(latencies)


def test_a_static_batch_ends_for_all_at_once_and_equal_settings_share_a_call() -> None:
    one = Request(0, "", steps=10, guidance_scale=4.0, seed=0)
    requests = [one, replace(one, index=1), replace(one, index=2, guidance_scale=7.5)]
    times = batch_times_of("2:10,4:15", 0.005)
    answers = in_static_batches(Arrivals(requests, 3), times, max_images=3)
    assert [each.latency for each in answers] == pytest.approx([0.265] * 3)
    alone = in_static_batches(Arrivals(requests, 3), times, max_images=1)
    assert [each.latency for each in alone] == pytest.approx([0.105, 0.210, 0.315])


def test_a_static_batch_waits_for_company() -> None:
    one = Request(0, "", steps=10, guidance_scale=4.0, seed=0)
    times = batch_times_of("2:10,4:15", 0.0)

    def served(second_at: float) -> list[float]:
        requests = [one, replace(one, index=1, arrival=second_at)]
        answers = in_static_batches(Arrivals(requests), times, max_images=2, timeout=0.05)
        return [each.latency for each in answers]

    assert served(0.04) == pytest.approx([0.19, 0.15])
    assert served(0.06) == pytest.approx([0.15, 0.09 + 0.05 + 0.1])


def test_the_command_prints_a_line_for_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--count", "12", "--rounds", "1", "--loads", "0.9"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (2 + len(RULES))
