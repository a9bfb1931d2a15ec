from bench.machine import this_machine, versions
from bench.metrics_cost import of_a_request, of_a_step
from bench.metrics_cost_page import page
from bench.results import Results, today
from darkroom_server.telemetry import Metrics, Recorder


def test_the_costs_are_measured_and_told() -> None:
    recorder = Recorder(Metrics(), ["demo"])
    parts = of_a_step(recorder, times=10)
    assert set(parts) == {"engine", "crossing", "serving"}
    assert all(cost > 0 for cost in parts.values())
    request = of_a_request(recorder, times=10)
    assert request > 0
    results = Results(
        bench="metrics_cost",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model={},
        settings={"rounds": 5, "times": 10},
        figures={
            "step": 25_000.0,
            "of_a_step": {"engine": 5.0, "crossing": 5.0, "serving": 10.0},
            "of_a_request": 30.0,
        },
    )
    text = page(results)
    assert "20.0 µs of metrics" in text
    assert "0.08%" in text
    assert "under the goal of 0.5%" in text
