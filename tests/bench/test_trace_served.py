"""The trace with real servers, in little: our own one, and what is done with several systems."""

import asyncio
import gzip
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.peers import bench as peers_bench
from bench.peers import process as peer_process
from bench.peers.registry import Peer
from bench.report.results import newest
from bench.trace import __main__ as trace
from bench.trace import copies, served
from bench.trace.figures import Swaps, read_swaps
from bench.trace.peers import serve as peers
from bench.trace.peers.registry import PEERS
from bench.trace.policies import Policy
from bench.trace.report import goals
from bench.trace.requests import Kind, TraceRequest
from bench.workload.arrivals import Answer, Outcome
from tests.bench.test_peers import RUNTIME

SWAPS = Swaps(loads=3, from_disk=1, bytes_moved=7, seconds=9.0, longest_wait=2.0)
SYSTEMS = ("darkroom", "first come", "lru", "ray", "triton")


def twelve(models: Sequence[str]) -> list[TraceRequest]:
    """Requests of all kinds, four steps each, that ask for one model after another."""
    kinds = list(Kind)
    return [
        TraceRequest(
            *(n, "", 4, 7.5, n),
            arrival=n / 20,
            images=1 + n % 2,
            model=models[n % len(models)],
            kind=kinds[n % 3],
            loras=n % 4 % 3,
        )
        for n in range(12)
    ]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what the benchmark writes."""
    for module in (served, peers, trace):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(trace, "PARTIAL", tmp_path / "trace_served.json")
    return tmp_path


def test_our_server_serves_the_trace_with_fewer_models_in_memory(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["m0", "m1", "m2"]
    config = served.config_of(
        work / "models",
        "test",
        policy=Policy.OURS,
        weight_bytes=copies.write_copies(work / "models", names),
        device_models=2,
        host_models=3,
        load_scale=0.01,
        swap_wait=30.0,
    )
    requests = twelve(names)
    unknown = replace(requests[0], index=12, model="unknown")

    async def play() -> list[Answer]:
        callers = served.Callers(config.port, 64)
        try:
            return await callers.play([*requests, unknown])
        finally:
            await callers.close()

    with served.server(config):
        answers = asyncio.run(play())
        # One server for both, which takes seconds to start.
        monkeypatch.setattr(served, "server", nullcontext)
        for name in names:
            lone = served.measure_alone(config, 64, name, [1, 2], steps=1)
            assert lone.keys() == {1, 2}
            assert all(seconds > 0.0 for seconds in lone.values())
    assert [each.outcome for each in answers] == [Outcome.IMAGE] * 12 + [Outcome.FAILED]
    assert [each.images for each in answers[:12]] == [1, 2] * 6
    assert all(0.0 < each.latency < 60.0 for each in answers)
    swaps = read_swaps(Path(config.swaps))
    assert swaps.loads > 3, "of three that are used in turn, the device holds two"
    assert swaps.from_disk == 3, "the host holds all of them"
    assert swaps.seconds > 0.0
    assert swaps.longest_wait > 0.0


class Served:
    """Stands for all systems: every answer takes 0.9 s, but those of Ray take nine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: dict[str, list[TraceRequest]] = {}
        monkeypatch.setattr(served, "measure_alone", lambda *_: {"1": 0.5})
        monkeypatch.setattr(served, "serve_trace", self._ours)
        monkeypatch.setattr(peers, "serve_trace", self._peer)
        monkeypatch.setattr(peers_bench, "info_of", lambda _: self)
        monkeypatch.setattr(peer_process, "versions_of", lambda peer: {peer.packages[0]: "1.2"})
        monkeypatch.setattr(copies, "write_copies", lambda *_: 1000)
        monkeypatch.setattr(Peer, "is_installed", True)
        self.runtime = RUNTIME

    def _ours(
        self, requests: Sequence[TraceRequest], config: Any, side: int
    ) -> tuple[list[Answer], Swaps]:
        return self._answer(config.policy.value, requests, 0.9)

    def _peer(
        self, requests: Sequence[TraceRequest], peer: Peer, config: Any, side: int
    ) -> tuple[list[Answer], Swaps]:
        assert config.runtime == RUNTIME
        name = next(name for name, each in PEERS.items() if each is peer)
        return self._answer(name, requests, 9.0 if name == "ray" else 0.9)

    def _answer(
        self, name: str, requests: Sequence[TraceRequest], seconds: float
    ) -> tuple[list[Answer], Swaps]:
        self.runs[name] = list(requests)
        return [Answer.of(r, r.arrival, r.arrival + seconds) for r in requests], SWAPS


def run(work: Path, *arguments: str) -> None:
    csv = work / "trace.csv"
    names = "gmt_create,predict_type,groupId,num_images_per_prompt,num_inference_steps"
    rows = [f"2024-11-15 16:57:{n:02},TXT_2_IMG,G,1.0,30.0,M{n % 3},0" for n in range(12)]
    csv.write_text("\n".join([f"{names},checkpoint_model_version_id,num_lora", *rows]) + "\n")
    zipped = work / "trace.csv.gz"
    zipped.write_bytes(gzip.compress(csv.read_bytes()))
    folders = ("--docs", str(work / "docs"), "--results", str(work / "results"))
    trace.main(["trace_served", "--smoke", "--trace", str(zipped), *folders, *arguments])


def test_every_system_gets_the_same_requests(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Served(monkeypatch)
    run(work, "--policies", *SYSTEMS)
    assert stand_in.runs.keys() == set(SYSTEMS)
    assert len(stand_in.runs["ray"]) == 12
    assert all(each == stand_in.runs["darkroom"] for each in stand_in.runs.values())
    results = newest("trace_served", work / "results")
    assert results is not None
    assert [each["policy"] for each in results.figures["runs"]] == [*SYSTEMS]
    assert results.figures["versions"] == {
        "ray": {"ray": "1.2"},
        "triton": {"nvidia-pytriton": "1.2"},
    }
    ours_and_policies, ours_and_peers, *_ = goals(results)
    # 2.5 seconds are in time: Ray's requests are late, and Triton's are the better ones.
    assert (ours_and_policies.reached, ours_and_policies.bound) == (1.0, 1.3)
    assert (ours_and_peers.reached, ours_and_peers.bound) == (1.0, 1.5)
    page = (work / "docs" / "benchmarks.md").read_text()
    assert "**busy, 0.9 of the capacity, 12 requests**" in page
    assert "| (c) Ray Serve, multiplexed | 0% / 0% / 0% |" in page
    assert "| (d) Triton, explicit loads | 100% / 100% / 100% |" in page
    assert "ray 1.2, nvidia-pytriton 1.2" in page


def test_an_interrupted_benchmark_continues(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Served(monkeypatch)
    run(work, "--policies", "darkroom", "ray")
    stand_in.runs.clear()
    run(work, "--policies", *SYSTEMS, "--resume", str(trace.PARTIAL))
    assert stand_in.runs.keys() == {"first come", "lru", "triton"}
    state = json.loads(trace.PARTIAL.read_text())
    assert state["runtime"] == asdict(RUNTIME)
    assert len(state["runs"]) == 5


def test_a_system_must_be_known_and_installed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Peer, "is_installed", False)
    for name, reason in {
        "triton": "not installed: triton; `make bench-peers-setup` does it",
        "fifo": "no policy is called fifo; choose from darkroom, first come",
    }.items():
        with pytest.raises(SystemExit) as ended:
            run(work, "--policies", name)
        assert ended.value.code == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        trace.main(["trace", "--smoke", "--policies", "ray"])
    assert "no policy is called ray" in capsys.readouterr().err
