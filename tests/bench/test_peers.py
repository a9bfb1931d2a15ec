"""What the peers' bench asks for, and what its servers are told."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from bench.arrivals import Arrivals, Drawn, Outcome
from bench.peers.load import Load
from bench.peers.protocols import Ended
from bench.peers.scenarios import FULL, SCENARIOS
from bench.peers.serving import Serving, by_settings, from_wire, to_wire
from bench.peers.trace import Trace, Work, mean_width, occupancy, read_trace, waste
from bench.workload import Request, bursts, mixed, sized, with_cancels, with_deadlines
from darkroom_server.core.model import ModelRuntime

RUNTIME = ModelRuntime(
    device="cpu",
    dtype="bfloat16",
    preset="fast",
    attention="sdpa",
    slice_size="",
    autocast=False,
    vae_tiling=False,
    channels_last=True,
    fp8_storage=False,
    safety_checker=False,
)


def test_bursts_come_together_and_at_the_mean_rate() -> None:
    arriving = bursts(mixed(4000, seed=0), rate=5.0, seed=0, size=8)
    moments = [request.arrival for request in arriving]
    assert moments == sorted(moments)
    assert len(set(moments)) == 500
    assert moments[-1] == pytest.approx(800, rel=0.1)


def test_deadlines_grow_with_the_steps_and_leavers_have_their_share() -> None:
    requests = with_deadlines(mixed(50, seed=0), 0.2)
    assert all(r.deadline == pytest.approx(r.steps * 0.2) for r in requests)
    leaving = [r for r in with_cancels(requests, 0.2, 0.1, seed=1) if r.cancel_after is not None]
    assert len(leaving) == 10
    assert all(0 <= (r.cancel_after or 0) <= 0.1 * r.steps for r in leaving)


def test_other_sizes_are_other_settings() -> None:
    first, second = sized(mixed(2, seed=0), (96,), seed=0), mixed(2, seed=0)
    assert first[0].settings != second[0].settings
    assert first[0].width == first[0].height == 96


def test_every_scenario_has_a_name_of_its_own_and_a_closed_loop_before_it() -> None:
    assert len(SCENARIOS) == len(FULL)
    seen = set()
    for scenario in FULL:
        assert scenario.load is None or scenario.mix in seen
        seen.add(scenario.mix)
        wanted = scenario.requests(20, seed=1, capacity=2.0, nominal=0.03, side=128)
        assert wanted == scenario.requests(20, seed=1, capacity=2.0, nominal=0.03, side=128)
        assert (scenario.load is None) == all(r.arrival == 0 for r in wanted)


def test_calls_have_equal_settings_and_are_not_too_wide() -> None:
    requests = [replace(r, steps=8 if r.index % 2 else 16, guidance_scale=4.0) for r in mixed(7, 0)]
    calls = [[request.index for request in call] for call in by_settings(requests, 3)]
    assert calls == [[0, 2, 4], [1, 3, 5], [6]]


def test_what_goes_over_the_wire_comes_back() -> None:
    request = sized(mixed(1, seed=0), (96,), seed=0)[0]
    assert from_wire(to_wire(request)) == request
    plain = mixed(1, seed=0)[0]
    assert from_wire(to_wire(plain)) == plain


def test_a_peer_is_told_on_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Serving(folder="f", runtime=RUNTIME, port=1, trace="t", widest=8, window=0.01)
    monkeypatch.setattr("sys.argv", ["server", *told.arguments()])
    assert Serving.of_command_line(None) == told


def test_a_trace_is_read_back_from_a_moment_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read_trace(path, 0.0) == []
    trace = Trace(str(path))
    trace.note(1.0, [1])
    trace.note(0.0, [2, 3])
    first, second = read_trace(path, 0.0)
    assert second.indexes == (2, 3)
    assert first.ended - first.began == pytest.approx(1.0)
    assert read_trace(path, second.began) == [second]


WORKS = [Work(10.0, 12.0, (1, 2)), Work(12.0, 13.0, (1,)), Work(15.0, 16.0, (1, 2, 3, 4))]


def test_occupancy_is_a_mean_over_time() -> None:
    assert occupancy(WORKS, start=10.0, seconds=6.0, bin=2.0) == pytest.approx([2.0, 0.5, 2.0])
    assert mean_width(WORKS) == pytest.approx((2 * 2 + 1 + 4) / 4)
    assert mean_width([]) == 0.0


def test_waste_is_the_leavers_share_of_what_was_done() -> None:
    drawn = [
        Drawn(1, 8, arrival=0.0, latency=2.5, outcome=Outcome.CANCELLED),
        Drawn(2, 8, arrival=0.0, latency=2.5),
    ]
    found = waste(WORKS, drawn, start=10.0)
    assert found.cancels == 1
    assert found.total == pytest.approx(2.0 / 2 + 1.0 + 1.0 / 4)
    assert found.late == pytest.approx(0.5 + 0.25)
    assert found.last == pytest.approx(0.5)


class Scripted:
    """Answers at once, with an error, or never, by the request's steps."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = False

    async def ask(self, request: Request, name: str, seconds: float | None) -> bytes:
        self.asked.append(request.index)
        if request.steps == 1:
            raise Ended(Outcome.REFUSED, "full")
        if request.steps == 2:
            await asyncio.Event().wait()
        return b"image"

    async def close(self) -> None:
        self.closed = True


def drawn_by_load(requests: list[Request], callers: int | None = None) -> list[Drawn]:
    asker = Scripted()
    under_test = Load(lambda: asker)
    drawn = under_test.draw(Arrivals(requests, callers))
    under_test.close()
    assert asker.closed
    assert sorted(asker.asked) == sorted(each.index for each in drawn)
    return sorted(drawn, key=lambda each: each.index)


def test_the_load_tells_how_each_request_ended() -> None:
    plain, refused, leaving, late = mixed(4, seed=0)
    drawn = drawn_by_load(
        [
            plain,
            replace(refused, steps=1),
            replace(leaving, steps=2, deadline=60.0, cancel_after=0.01),
            replace(late, steps=2, deadline=0.01, cancel_after=60.0),
        ]
    )
    assert [each.outcome for each in drawn] == [
        Outcome.IMAGE,
        Outcome.REFUSED,
        Outcome.CANCELLED,
        Outcome.EXPIRED,
    ]
    assert drawn[2].latency >= 0.01


def test_the_load_keeps_to_a_schedule_and_to_its_callers() -> None:
    scheduled = [replace(r, arrival=0.02 * r.index) for r in mixed(5, seed=0)]
    assert [each.arrival for each in drawn_by_load(scheduled)] == [r.arrival for r in scheduled]
    assert len(drawn_by_load(mixed(20, seed=0), callers=3)) == 20
