"""The simulation of batches that wait for company."""

import gzip
from pathlib import Path

import pytest

from bench.hold import Engine, at_rate, if_it_pays, main, never, of_trace, up_to
from bench.simulate import POLICIES, batch_times_of, capacity, latencies
from bench.workload.requests import Request, mixed, poisson

DECODE = 0.040
TIMES = batch_times_of("2:25,4:35,8:60", DECODE)


def engine(wait: object = never, max_rows: int = 8) -> Engine:
    return Engine(TIMES, max_rows=max_rows, wait=wait)  # type: ignore[arg-type]


def lone(count: int, apart: float, steps: int = 4) -> list[Request]:
    return [Request(i, "", steps, 4.0, seed=0, arrival=i * apart) for i in range(count)]


def test_without_waiting_it_is_the_simulation_of_the_dispatcher() -> None:
    requests = mixed(300, seed=1)
    trace = poisson(requests, 0.9 * capacity(TIMES, requests), seed=1)
    wanted = latencies(trace, POLICIES["core.order"], TIMES, max_rows=8)
    served = engine()
    assert {a.index: a.latency for a in served.serve(trace)} == pytest.approx(wanted, rel=0.01)
    assert served.waited == 0
    # Negative control: waiting changes the latencies.
    waiting = engine(up_to(0.1))
    found = {a.index: a.latency for a in waiting.serve(trace)}
    assert found != pytest.approx(wanted, rel=0.01)
    assert waiting.waited > 0


def test_company_that_comes_in_time_shares_the_first_batch() -> None:
    pair = [*lone(2, 0.001), *lone(2, 0.001)]
    pair = [Request(i, "", 4, 4.0, seed=0, arrival=r.arrival + i // 2) for i, r in enumerate(pair)]
    apart, together = (
        sorted(engine(wait, max_rows=4).serve(pair), key=lambda each: each.index)
        for wait in (never, up_to(0.01))
    )
    # The first pair shows that there is company; the second one shares all its four batches.
    assert together[3].latency == pytest.approx(4 * 0.035 + 2 * DECODE)
    assert apart[3].latency > together[3].latency + 0.01


def test_a_lone_caller_never_waits() -> None:
    served = engine(up_to(0.05))
    answers = served.serve(lone(20, 0.0), callers=1)
    assert served.waited == 0
    assert [each.latency for each in answers] == pytest.approx([4 * 0.025 + DECODE] * 20)


def test_the_rule_waits_only_if_a_shared_step_saves_more_than_the_idle_time() -> None:
    wait = if_it_pays(0.01, engine().batch_seconds)
    saved = 0.025 + 0.025 - 0.035
    assert wait(2, 0.9 / saved) == 0
    assert wait(2, 1.1 / saved) == 0.01


def test_the_rows_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    names = "gmt_create,predict_type,num_images_per_prompt,num_inference_steps"
    with gzip.open(path, "wt") as file:
        file.write(
            f"{names}\n2024-11-15 16:57:50,TXT_2_IMG,1.0,30.0\n2024-11-15 16:58:00,IMG_2_IMG,1,30\n"
            "2024-11-15 16:58:50,TXT_2_IMG,4.0,40.0\n2024-11-15 17:58:50,TXT_2_IMG,1.0,40.0\n"
        )
    found = of_trace(path, 2)
    assert [(r.arrival, r.images, r.steps) for r in found] == [(0, 1, 30), (60, 4, 40)]
    scaled = at_rate(found, 2.5)
    assert [r.arrival for r in scaled] == [0, 2]


def test_the_command_prints_a_line_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--arrivals", "20", "--loads", "0.9", "--callers", "2", "--waits", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * 3
