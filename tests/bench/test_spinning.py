"""The benchmark of OpenMP's waiting threads."""

import os
from dataclasses import replace
from typing import Any

import psutil
import pytest

from bench.micro import spinning
from bench.micro.spinning import BENCHMARK, BESIDE, CLOSED, LONE, POLICIES, WAITED, busy_process
from darkroom_server.core.engine_config import EngineConfig
from tests.bench.test_results import RESULTS

QUIET, HALF, BUSY = BESIDE


def test_the_busy_process_uses_a_core_and_ends() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with busy_process(1.0):
        (busy,) = (each for each in psutil.Process().children() if each.pid not in before)
        while busy.cpu_times().user < 0.05:
            pass
    assert not psutil.pid_exists(busy.pid)


def test_alone_there_is_no_other_process() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with busy_process(0.0):
        assert {child.pid for child in psutil.Process().children()} == before


def test_each_engine_has_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Peer:
        def __init__(self, engine: Any) -> None:
            seen.append(os.environ.get("OMP_WAIT_POLICY"))

        def close(self) -> None:
            """Nothing to stop."""

    monkeypatch.setattr(spinning, "EnginePeer", Peer)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for policy in POLICIES.values():
        with spinning.new_engine(EngineConfig(models=()), policy):
            assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert seen == [None, "PASSIVE", "ACTIVE"]


def test_the_section_compares_the_rule_with_both() -> None:
    def measured(beside: str, rule: float, sleep: float, spin: float) -> dict[str, Any]:
        seconds = zip(POLICIES, (rule, sleep, spin), strict=True)
        return {
            "beside": beside,
            **{name: {LONE: s, CLOSED: s / 4, WAITED: s / 10} for name, s in seconds},
        }

    rounds = [
        measured(QUIET, 0.2, 0.4, 0.2),
        measured(HALF, 0.3, 0.4, 0.3),
        measured(BUSY, 0.6, 0.6, 3.0),
    ]
    settings = {"rounds": 1, "steps": 16}
    text = BENCHMARK.section(replace(RESULTS, figures={"rounds": rounds}, settings=settings))
    (lone,) = (line for line in text.splitlines() if f"{LONE}, {QUIET}" in line)
    assert "| 200 | 400 | 200 | 0.50 (0.50 to 0.50) | 1.00 (1.00 to 1.00) |" in lone
    (closed,) = (line for line in text.splitlines() if f"{CLOSED}, {BUSY}" in line)
    assert "| 150 | 150 | 750 | 1.00 (1.00 to 1.00) | 0.20 (0.20 to 0.20) |" in closed
    assert f"| {BUSY} | 0.06 to 0.06 | 0.06 to 0.06 | 0.30 to 0.30 |" in text
