"""One bench: every peer gets every scenario, a fresh server for each of them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import grpc

from bench.arrivals import Outcome
from bench.contender import WIDEST, Remote
from bench.peers.equality import Different, compare, references
from bench.peers.load import make_load
from bench.peers.process import PeerProcess, serving_peer
from bench.peers.roster import DARKROOM, PEERS, SERIAL, Peer
from bench.peers.scenarios import CALLERS, CLOSED, Mix, Scenario
from bench.peers.serving import Serving
from bench.peers.trace import mean_width, occupancy, read_trace, waste
from bench.peers.windows import best, trials, tried
from bench.pipelines import make_pipelines
from bench.results import Run
from bench.threaded import make_engine
from bench.workload import Request, mixed
from darkroom.v1 import model_pb2, model_pb2_grpc
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.model import ModelInfo

NOMINAL_STEPS = 20
LONE_STEPS = 16
STREAMS = 10
"""Lone requests that are asked how soon they tell of progress."""

SECONDS_PER_BIN = 1.0
"""Of the occupancy over time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much: requests of a closed loop and of an open one, pairs of lone ones, rounds.

    ``window`` is that of the batching peers, in seconds, unless ``windows`` are tried first.
    """

    peers: Sequence[str]
    scenarios: Sequence[Scenario]
    rounds: int
    closed: int
    arrivals: int
    pairs: int
    seed: int
    window: float
    windows: Sequence[float] = ()


class PeersBench:
    """The peers, and what was measured of them so far.

    ``lost`` has a line for each peer or run that came to nothing. ``keep`` is called after each
    run. ``runs`` are those that an earlier bench of the same plan made before it was cut short.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        keep: Callable[[], None],
        runs: Sequence[Run] = (),
    ) -> None:
        self.plan = plan
        self.runs = list(runs)
        self.lost: list[str] = []
        self.equality: dict[str, dict[str, Any]] = {}
        self._keep = keep
        self.info = _info_of(source)
        self._serving = Serving(
            folder=source.location,
            runtime=self.info.runtime,
            port=0,
            trace="",
            widest=WIDEST,
            window=plan.window,
        )
        self._pipe = Remote(partial(make_pipelines, source.location, self.info.runtime, 1))
        self._pipe.warm_up()
        self._peers = [PEERS[name] for name in plan.peers]
        self._turn = 0

    def check(self) -> None:
        """Start each peer once, and compare its pictures; those that fail are left out."""
        expected = references(self._serving.folder, self._serving.runtime)
        for peer in list(self._peers):
            try:
                with serving_peer(peer, self._serving) as process:
                    found = compare(process, expected, self._serving.runtime.dtype)
            except (RuntimeError, OSError, Different) as error:
                self.lost.append(f"{peer.label} is left out: {_one_line(error)}")
                print(self.lost[-1], flush=True)
                self._peers.remove(peer)
                continue
            self.equality[peer.name] = asdict(found)
            print(
                f"{peer.label}: {found.identical} of {found.alone} files identical alone, "
                f"{found.together_identical} of {found.together} together",
                flush=True,
            )
        if SERIAL not in self.equality:
            raise RuntimeError("without (a) there is no capacity to take shares of")

    def run(self) -> None:
        """The windows; then round by round the closed loops, for the capacities, and the open ones.

        So the loads of a round fit the machine as it is then, be it another day.
        """
        measured = {run.scenario for run in self.runs} & {s.name for s in self.plan.scenarios}
        if not measured:  # Or a peer would go on with another window than it began with.
            for scenario in trials(self.plan.windows):
                self._compete(scenario, round=0)
        for round in range(self.plan.rounds):
            for scenario in sorted(self.plan.scenarios, key=lambda each: each.load is not None):
                self._compete(scenario, round)

    def close(self) -> None:
        """Stop what still runs."""
        self._pipe.close()

    def nominal(self) -> float:
        """Seconds of a step of a lone request of a bare ``pipe()``, just now."""
        requests = [replace(r, steps=NOMINAL_STEPS) for r in mixed(3, seed=0)]
        drawn = self._pipe.draw(requests, callers=1).drawn
        return statistics.median(each.latency for each in drawn) / NOMINAL_STEPS

    def _compete(self, scenario: Scenario, round: int) -> None:
        """Let each have its go; who goes first changes each time."""
        peers = [p for p in self._peers if _takes_part(p, scenario)]
        if not peers:
            return
        self._turn += 1
        turn = self._turn % len(peers)
        done = {(r.contender, r.scenario, r.round) for r in self.runs}
        for peer in peers[turn:] + peers[:turn]:
            if (peer.name, scenario.name, round) in done:
                continue
            try:
                run = self._go(peer, scenario, round)
            except (RuntimeError, OSError) as error:
                self.lost.append(
                    f"{peer.label}, {scenario.name}, round {round}: {_one_line(error)}"
                )
                print(self.lost[-1], flush=True)
                continue
            self.runs.append(run)
            images = sum(each.outcome is Outcome.IMAGE for each in run.drawn)
            print(
                f"{scenario.name} round {round} {peer.name}: {images} images in "
                f"{run.seconds:.1f} s, a step {run.nominal_before * 1000:.1f} to "
                f"{run.nominal_after * 1000:.1f} ms",
                flush=True,
            )
            self._keep()

    def _go(self, peer: Peer, scenario: Scenario, round: int) -> Run:
        open_loop = scenario.load is not None
        count = self.plan.arrivals if open_loop else self.plan.closed
        serial = self._serial(scenario.mix, round) if open_loop else None
        capacity = serial.drawn_while_busy / serial.busy_seconds if serial else 0.0
        requests = scenario.requests(
            count,
            self.plan.seed + 100 * open_loop + round,
            capacity,
            serial.nominal_before if serial else 0.0,
            self.info.defaults.width,
        )
        serving = replace(self._serving, window=self._window(peer, scenario))
        with serving_peer(peer, serving) as process:
            load = Remote(partial(make_load, peer.wire, process.port, scenario.stream))
            try:
                figures = self._before(process, load, scenario, requests)
                if peer.batches:
                    figures["window_seconds"] = serving.window
                before = self.nominal()
                cpu = process.cpu_seconds()
                report = load.draw(requests, None if open_loop else CALLERS)
                cpu = process.cpu_seconds() - cpu
                run = Run(
                    scenario=scenario.name,
                    contender=peer.name,
                    round=round,
                    nominal_before=before,
                    nominal_after=self.nominal(),
                    drawn=report.drawn,
                    rate=(scenario.load or 0.0) * capacity if open_loop else None,
                    callers=None if open_loop else CALLERS,
                    figures=figures,
                )
                figures |= self._after(process, run, report.began, cpu)
            finally:
                load.close()
        return run

    def _serial(self, mix: Mix, round: int) -> Run:
        """How (a) fared in the closed loop: the loads are shares of what it could do."""
        wanted = (Scenario(mix=mix).name, SERIAL, round)
        for run in self.runs:
            if (run.scenario, run.contender, run.round) == wanted:
                return run
        raise RuntimeError(f"(a) came to nothing in the closed loop, so there is no load for {mix}")

    def _window(self, peer: Peer, scenario: Scenario) -> float:
        """How long a batch of ``peer`` waits for company, in seconds."""
        if scenario.window is not None:
            return scenario.window
        rates = tried(self.runs).get(peer.name)
        return best(rates) if rates else self.plan.window

    def _before(
        self, process: PeerProcess, load: Remote, scenario: Scenario, requests: Sequence[Request]
    ) -> dict[str, Any]:
        """Warm up; what is asked of a server before the load comes."""
        figures: dict[str, Any] = {"ready_seconds": process.ready_seconds}
        if not scenario.stream:
            first = [replace(r, steps=8) for r in mixed(1, seed=2)]
            figures["first_image_seconds"] = load.draw(first, callers=1).drawn[0].latency
        load.warm_up()
        some = [replace(r, steps=2, deadline=None, cancel_after=None) for r in requests[:16]]
        load.draw(some, callers=CALLERS)
        if scenario == CLOSED:
            figures["idle_cpu"] = process.idle_cpu()
            figures["lone"] = self._lone(load)
            if process.peer.name == DARKROOM:
                figures["first_progress"] = _first_progress(process)
        if process.peer.name == DARKROOM:
            figures["max_rows"] = _max_rows(process.port)
        return figures

    def _after(
        self, process: PeerProcess, run: Run, began: float, cpu_seconds: float
    ) -> dict[str, Any]:
        """What a run took."""
        works = read_trace(process.trace, began)
        bins = occupancy(works, began, run.seconds, SECONDS_PER_BIN)
        return {
            "cpu_seconds": cpu_seconds,
            "footprint": asdict(process.footprint()),
            "width": mean_width(works),
            "waste": asdict(waste(works, run.drawn, began)),
            "occupancy": [round(images, 2) for images in bins],
        }

    def _lone(self, load: Remote) -> list[dict[str, float]]:
        """Seconds of one request alone, of the peer and of a bare ``pipe()``, in turns."""
        found = []
        for index, request in enumerate(mixed(self.plan.pairs, seed=1)):
            alone = [replace(request, steps=LONE_STEPS)]
            both = {"peer": load, "pipe": self._pipe}
            names = list(both) if index % 2 else list(both)[::-1]
            found.append({n: both[n].draw(alone, callers=1).drawn[0].latency for n in names})
        return found


def _takes_part(peer: Peer, scenario: Scenario) -> bool:
    if scenario.window is not None:
        return peer.batches
    return peer.name == DARKROOM or not scenario.stream


def _first_progress(process: PeerProcess) -> list[float]:
    """Seconds until lone requests tell of their first step; empty where no stream is served."""
    load = Remote(partial(make_load, process.peer.wire, process.port, True))
    try:
        requests = [replace(r, steps=LONE_STEPS) for r in mixed(STREAMS, seed=3)]
        drawn = load.draw(requests, callers=1).drawn
    finally:
        load.close()
    return [each.first_progress for each in drawn if each.first_progress is not None]


def _max_rows(port: int) -> int:
    """The rows of a pass that Darkroom measured at its start to be enough."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        response = stub.GetModel(model_pb2.GetModelRequest(), timeout=10)
        rows: int = response.model.limits.max_rows
    return rows


def _info_of(source: ModelSource) -> ModelInfo:
    """The model as Darkroom's engine holds it: dtype and memory format are what it measured."""
    engine = Remote(partial(make_engine, EngineConfig(models=(source,), max_rows=2 * WIDEST)))
    engine.close()
    if engine.info is None:
        raise RuntimeError("the engine told nothing of its model")
    return engine.info


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
