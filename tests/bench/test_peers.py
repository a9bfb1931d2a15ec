"""The peers' load, and the configuration and traces of their servers."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from bench.peers.alone import alone_seconds, kind_of, kinds_of
from bench.peers.load import Load
from bench.peers.protocols import Ended
from bench.peers.scenarios import FULL, SCENARIOS, UNIFORM_CLOSED, Mix, Scenario
from bench.peers.servers.config import ServerConfig, by_settings, from_wire, to_wire
from bench.peers.servers.trace import Trace, Work, mean_width, occupancy, read_trace, waste
from bench.workload.arrivals import Answer, Arrivals, Outcome
from bench.workload.requests import Request, bursts, mixed, sized, with_cancels, with_deadlines
from darkroom_server.core.model_runtime import ModelRuntime

RUNTIME = ModelRuntime(
    device="cpu",
    dtype="bfloat16",
    preset="fast",
    attention="sdpa",
    slice_size="",
    autocast=False,
    vae_tiling=False,
    channels_last=True,
    vae_channels_last=True,
    fp8_storage=False,
    safety_checker=False,
)


def test_bursts_come_together_and_at_the_mean_rate() -> None:
    arriving = bursts(mixed(4000, seed=0), rate=5.0, seed=0, size=8)
    moments = [request.arrival for request in arriving]
    assert moments == sorted(moments)
    assert len(set(moments)) == 500
    assert moments[-1] == pytest.approx(800, rel=0.1)


def test_deadlines_grow_with_the_steps_and_cancels_have_their_share() -> None:
    requests = with_deadlines(mixed(50, seed=0), 0.2)
    assert all(r.deadline == pytest.approx(r.steps * 0.2) for r in requests)
    cancelled = [r for r in with_cancels(requests, 0.2, 0.1, seed=1) if r.cancel_after is not None]
    assert len(cancelled) == 10
    assert all(0 <= (r.cancel_after or 0) <= 0.1 * r.steps for r in cancelled)


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


def test_requests_that_are_all_alike_are_those_of_the_trace() -> None:
    scenario = Scenario(mix=Mix.UNIFORM, load=0.5)
    wanted = scenario.requests(2000, seed=1, capacity=8.0, nominal=0.03, side=128)
    assert {request.steps for request in wanted} == {30}
    assert {request.images for request in wanted} == {1, 2, 4, 8}
    images = sum(request.images for request in wanted)
    assert images / wanted[-1].arrival == pytest.approx(0.5 * 8.0, rel=0.1)


def test_requests_of_an_earlier_version_are_recognised() -> None:
    now, before = Answer(0, 30, 0.0, 1.0, images=4), Answer(0, 16, 0.0, 1.0)
    assert UNIFORM_CLOSED.has([now])
    assert not UNIFORM_CLOSED.has([before])
    assert Mix.UNIFORM.text_of([before]) == "all alike (16 steps, guidance 7.5)"
    assert "images of a request: 1 50%, 4 50%" in Mix.UNIFORM.text_of([now, replace(now, images=1)])


@pytest.mark.parametrize("scenario", FULL, ids=lambda scenario: scenario.name)
def test_the_lone_latency_of_every_request_is_measured(scenario: Scenario) -> None:
    measured = {kind: float(i) for i, kind in enumerate(kinds_of(scenario.mix, side=128))}
    for seed in range(3):
        wanted = scenario.requests(200, seed=seed, capacity=2.0, nominal=0.03, side=128)
        found = alone_seconds(wanted[::-1], measured)
        assert found == [measured[kind_of(request)] for request in wanted]


def test_calls_have_equal_settings_and_are_not_too_wide() -> None:
    requests = [replace(r, steps=8 if r.index % 2 else 16, guidance_scale=4.0) for r in mixed(7, 0)]
    calls = [[request.index for request in call] for call in by_settings(requests, 3)]
    assert calls == [[0, 2, 4], [1, 3, 5], [6]]


def test_the_wire_form_of_a_request_is_lossless() -> None:
    request = sized(mixed(1, seed=0), (96,), seed=0)[0]
    assert from_wire(to_wire(request)) == request
    plain = mixed(1, seed=0)[0]
    assert from_wire(to_wire(plain)) == plain


def test_the_command_line_carries_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(
        folder="f", runtime=RUNTIME, port=1, trace="t", max_batch_images=8, batch_timeout=0.01
    )
    monkeypatch.setattr("sys.argv", ["server", *config.arguments()])
    assert ServerConfig.of_command_line(None) == config


def test_a_trace_is_read_back_from_a_moment_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read_trace(path, 0.0) == []
    trace = Trace(str(path))
    trace.record(1.0, [1])
    trace.record(0.0, [2, 3])
    first, second = read_trace(path, 0.0)
    assert second.indexes == (2, 3)
    assert first.ended - first.began == pytest.approx(1.0)
    assert read_trace(path, second.began) == [second]


WORKS = [Work(10.0, 12.0, (1, 2)), Work(12.0, 13.0, (1,)), Work(15.0, 16.0, (1, 2, 3, 4))]


def test_occupancy_is_a_mean_over_time() -> None:
    assert occupancy(WORKS, start=10.0, seconds=6.0, bin=2.0) == pytest.approx([2.0, 0.5, 2.0])
    assert mean_width(WORKS) == pytest.approx((2 * 2 + 1 + 4) / 4)
    assert mean_width([]) == 0.0


def test_waste_is_the_share_of_cancelled_requests() -> None:
    answers = [
        Answer(1, 8, arrival=0.0, latency=2.5, outcome=Outcome.CANCELLED),
        Answer(2, 8, arrival=0.0, latency=2.5),
    ]
    found = waste(WORKS, answers, start=10.0)
    assert found.cancels == 1
    assert found.total == pytest.approx(2.0 / 2 + 1.0 + 1.0 / 4)
    assert found.late == pytest.approx(0.5 + 0.25)
    assert found.last == pytest.approx(0.5)


class Scripted:
    """A client that answers at once, with an error, or never, by the request's steps."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.closed = False

    async def generate(self, request: Request, name: str, seconds: float | None) -> list[bytes]:
        self.received.append(request.index)
        if request.steps == 1:
            raise Ended(Outcome.REJECTED, "full")
        if request.steps == 2:
            await asyncio.Event().wait()
        return [b"image"] * request.images

    async def close(self) -> None:
        self.closed = True


def answers_of_load(requests: list[Request], callers: int | None = None) -> list[Answer]:
    client = Scripted()
    under_test = Load(lambda: client)
    answers = under_test.serve(Arrivals(requests, callers))
    under_test.close()
    assert client.closed
    assert sorted(client.received) == sorted(each.index for each in answers)
    return sorted(answers, key=lambda each: each.index)


def test_the_load_reports_how_each_request_ended() -> None:
    plain, rejected, cancelled, late = mixed(4, seed=0)
    answers = answers_of_load(
        [
            plain,
            replace(rejected, steps=1),
            replace(cancelled, steps=2, deadline=60.0, cancel_after=0.01),
            replace(late, steps=2, deadline=0.01, cancel_after=60.0),
        ]
    )
    assert [each.outcome for each in answers] == [
        Outcome.IMAGE,
        Outcome.REJECTED,
        Outcome.CANCELLED,
        Outcome.EXPIRED,
    ]
    assert answers[2].latency >= 0.01


def test_the_load_follows_a_schedule_or_its_callers() -> None:
    scheduled = [replace(r, arrival=0.02 * r.index) for r in mixed(5, seed=0)]
    assert [each.arrival for each in answers_of_load(scheduled)] == [r.arrival for r in scheduled]
    assert len(answers_of_load(mixed(20, seed=0), callers=3)) == 20
