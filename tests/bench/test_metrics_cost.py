from dataclasses import replace

from bench.micro.metrics_cost import BENCHMARK, of_a_request, of_a_step
from darkroom_server.telemetry import Metrics
from tests.bench.test_results import RESULTS


def test_every_part_of_the_metrics_costs_time() -> None:
    metrics = Metrics(["demo"])
    parts = of_a_step(metrics, times=10)
    assert set(parts) == {"engine", "crossing", "serving"}
    assert all(cost > 0 for cost in parts.values())
    assert of_a_request(metrics, times=10) > 0


def test_the_section_compares_the_metrics_with_a_step() -> None:
    figures = {
        "step": 25_000.0,
        "of_a_step": {"engine": 5.0, "crossing": 5.0, "serving": 10.0},
        "of_a_request": 30.0,
    }
    text = BENCHMARK.section(replace(RESULTS, figures=figures, settings={"rounds": 5, "times": 10}))
    assert "a step cost 20.0 µs" in text
    assert "0.08%" in text
    assert "under the goal of 0.5%" in text
