"""Every peer gets every scenario, while the servers of the others stand still."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import grpc

from bench.inprocess.engine import make_engine
from bench.inprocess.pipelines import make_pipelines
from bench.inprocess.remote import MAX_BATCH_IMAGES, Remote
from bench.peers.alone import alone_seconds, measure_alone
from bench.peers.batch_timeout_search import best, trials, tried
from bench.peers.equality import Different, compare, references
from bench.peers.load import make_load
from bench.peers.process import PeerProcess, serving_peer
from bench.peers.registry import PEERS, SERIAL, WORK, Peer
from bench.peers.report.slo import ALONE
from bench.peers.scenarios import CALLERS, CLOSED, Mix, Scenario
from bench.peers.servers.config import ServerConfig
from bench.peers.servers.trace import mean_width, occupancy, read_trace, waste
from bench.peers.standing import StandingServers
from bench.report.results import Run
from bench.workload.arrivals import Outcome
from bench.workload.requests import Request, mixed
from darkroom.v1 import model_pb2, model_pb2_grpc
from darkroom_server.core.engine_config import Compile, EngineConfig, ModelSource
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_runtime import DenoiserForm

NOMINAL_STEPS = 20
LONE_STEPS = 16
STREAMS = 10
"""Lone requests that measure the time to the first progress."""

SECONDS_PER_BIN = 1.0
"""Resolution of the occupancy over time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much: requests of a closed loop and of an open one, pairs of lone ones, rounds.

    ``batch_timeout``, in seconds, is that of the peers that batch, unless ``batch_timeouts`` are
    tried first.
    """

    peers: Sequence[str]
    scenarios: Sequence[Scenario]
    rounds: int
    closed: int
    arrivals: int
    pairs: int
    seed: int
    batch_timeout: float
    batch_timeouts: Sequence[float] = ()


class PeersBench:
    """The peers, and their measurements so far.

    ``lost`` has a line for each peer or run that failed. ``on_run`` is called after each run.
    ``runs`` are those of an earlier benchmark of the same plan that was interrupted.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        on_run: Callable[[], None],
        runs: Sequence[Run] = (),
    ) -> None:
        self.plan = plan
        self.runs = list(runs)
        self.lost: list[str] = []
        self.equality: dict[str, dict[str, Any]] = {}
        self._on_run = on_run
        self.info = info_of(source)
        self._config = ServerConfig(
            folder=source.location,
            runtime=self.info.runtime,
            port=0,
            trace="",
            max_batch_images=MAX_BATCH_IMAGES,
            batch_timeout=plan.batch_timeout,
        )
        self._pipe = Remote(partial(make_pipelines, source.location, self.info.runtime, 1))
        self._pipe.warm_up()
        self._peers = [PEERS[name] for name in plan.peers]
        compiled = any(peer.compiled for peer in self._peers)
        self._compiled = _compiled_file(source) if compiled else ""
        self._servers = StandingServers()
        self._turn = 0

    def check(self) -> None:
        """Start each peer once and compare its images; omits peers that fail.

        Raises ``RuntimeError`` if (a) fails.
        """
        expected: dict[bool, list[bytes]] = {}
        for peer in list(self._peers):
            config = self._config_of(peer)
            if peer.compiled not in expected:
                expected[peer.compiled] = references(config)
            try:
                with serving_peer(peer, config) as process:
                    if peer.is_darkroom:
                        _check_form(process)
                    found = compare(process, expected[peer.compiled], config.runtime.dtype)
            except (RuntimeError, OSError, Different) as error:
                self.lost.append(f"{peer.label} is omitted: {_one_line(error)}")
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
            raise RuntimeError("(a) failed; the loads are shares of its capacity")

    def run(self) -> None:
        """Try the batch timeouts; then, in each round, the closed loops before the open ones.

        So the loads of a round are shares of the capacity of the same round, even on another day.
        """
        measured = {run.scenario for run in self.runs} & {s.name for s in self.plan.scenarios}
        if not measured:  # A peer must keep its batch timeout in all rounds.
            for scenario in trials(self.plan.batch_timeouts):
                self._compete(scenario, round=0)
        for round in range(self.plan.rounds):
            for scenario in sorted(self.plan.scenarios, key=lambda each: each.load is not None):
                self._compete(scenario, round)

    def close(self) -> None:
        """End the servers and the process of the bare ``pipe()``."""
        self._servers.close()
        self._pipe.close()

    def nominal(self) -> float:
        """Seconds of a step of a lone request of ``pipe()``: the current speed of the machine."""
        requests = [replace(r, steps=NOMINAL_STEPS) for r in mixed(3, seed=0)]
        answers = self._pipe.serve(requests, callers=1).answers
        return statistics.median(each.latency for each in answers) / NOMINAL_STEPS

    def _compete(self, scenario: Scenario, round: int) -> None:
        """Run each peer; which one is first changes each time."""
        peers = [p for p in self._peers if _takes_part(p, scenario)]
        if not peers:
            return
        self._turn += 1
        turn = self._turn % len(peers)
        done = {(r.peer, r.scenario, r.round) for r in self.runs}
        for peer in peers[turn:] + peers[:turn]:
            if (peer.name, scenario.name, round) in done:
                continue
            try:
                run = self._run(peer, scenario, round)
            except (RuntimeError, OSError) as error:
                self.lost.append(
                    f"{peer.label}, {scenario.name}, round {round}: {_one_line(error)}"
                )
                print(self.lost[-1], flush=True)
                continue
            self.runs.append(run)
            images = sum(a.images for a in run.answers if a.outcome is Outcome.IMAGE)
            print(
                f"{scenario.name} round {round} {peer.name}: {images} images in "
                f"{run.seconds:.1f} s, a step {run.nominal_before * 1000:.1f} to "
                f"{run.nominal_after * 1000:.1f} ms",
                flush=True,
            )
            self._on_run()

    def _run(self, peer: Peer, scenario: Scenario, round: int) -> Run:
        open_loop = scenario.load is not None
        count = self.plan.arrivals if open_loop else self.plan.closed
        serial = self._serial(scenario.mix, round) if open_loop else None
        capacity = serial.images_while_busy / serial.busy_seconds if serial else 0.0
        requests = scenario.requests(
            count,
            self.plan.seed + 100 * open_loop + round,
            capacity,
            serial.nominal_before if serial else 0.0,
            self.info.defaults.width,
        )
        config = self._config_of(peer)
        config = replace(config, batch_timeout=self._batch_timeout(peer, scenario))
        with self._servers.serving(peer, config) as process:
            load = Remote(partial(make_load, peer.wire, process.port, scenario.stream))
            try:
                figures = self._before(process, load, scenario, requests)
                if peer.batches:
                    figures["batch_timeout_seconds"] = config.batch_timeout
                before = self.nominal()
                cpu = process.cpu_seconds()
                report = load.serve(requests, None if open_loop else CALLERS)
                cpu = process.cpu_seconds() - cpu
                run = Run(
                    scenario=scenario.name,
                    peer=peer.name,
                    round=round,
                    nominal_before=before,
                    nominal_after=self.nominal(),
                    answers=report.answers,
                    rate=scenario.rate(requests, capacity) if open_loop else None,
                    callers=None if open_loop else CALLERS,
                    figures=figures,
                )
                figures |= self._after(process, run, report.began, cpu)
            finally:
                load.close()
        if serial is not None:
            run.figures[ALONE] = alone_seconds(requests, serial.figures["alone"])
        elif peer.name == SERIAL:
            side = self.info.defaults.width
            run.figures["alone"] = measure_alone(self._pipe, scenario.mix, side)
        return run

    def _config_of(self, peer: Peer) -> ServerConfig:
        return replace(self._config, compiled=self._compiled) if peer.compiled else self._config

    def _serial(self, mix: Mix, round: int) -> Run:
        """The closed loop of (a), which has the capacity and the lone latencies of a round."""
        wanted = (Scenario(mix=mix).name, SERIAL, round)
        for run in self.runs:
            if (run.scenario, run.peer, run.round) == wanted:
                return run
        raise RuntimeError(f"(a) failed in the closed loop; there is no capacity for {mix}")

    def _batch_timeout(self, peer: Peer, scenario: Scenario) -> float:
        """How long a batch of ``peer`` waits to fill, in seconds."""
        if scenario.batch_timeout is not None:
            return scenario.batch_timeout
        rates = tried(self.runs).get(peer.name)
        return best(rates) if rates else self.plan.batch_timeout

    def _before(
        self, process: PeerProcess, load: Remote, scenario: Scenario, requests: Sequence[Request]
    ) -> dict[str, Any]:
        """Warm up, and take the measurements that precede the load."""
        figures: dict[str, Any] = {}
        if process.is_new:
            figures["ready_seconds"] = process.ready_seconds
            if not scenario.stream:
                first = [replace(r, steps=8) for r in mixed(1, seed=2)]
                figures["first_image_seconds"] = load.serve(first, callers=1).answers[0].latency
            load.warm_up()
        some = [replace(r, steps=2, deadline=None, cancel_after=None) for r in requests[:16]]
        load.serve(some, callers=CALLERS)
        if scenario == CLOSED:
            figures["idle_cpu"] = process.idle_cpu()
            figures["lone"] = self._lone(load)
            if process.peer.is_darkroom:
                figures["first_progress"] = _first_progress(process)
        if process.peer.is_darkroom:
            figures["max_rows"] = _model_of(process.port).limits.max_rows
        return figures

    def _after(
        self, process: PeerProcess, run: Run, began: float, cpu_seconds: float
    ) -> dict[str, Any]:
        """The resources of a run."""
        works = read_trace(process.trace, began)
        bins = occupancy(works, began, run.seconds, SECONDS_PER_BIN)
        return {
            "cpu_seconds": cpu_seconds,
            "footprint": asdict(process.footprint()),
            "width": mean_width(works),
            "waste": asdict(waste(works, run.answers, began)),
            "occupancy": [round(images, 2) for images in bins],
        }

    def _lone(self, load: Remote) -> list[dict[str, float]]:
        """Seconds of a lone request, of the peer and of a bare ``pipe()``, in alternating order."""
        found = []
        for index, request in enumerate(mixed(self.plan.pairs, seed=1)):
            alone = [replace(request, steps=LONE_STEPS)]
            both = {"peer": load, "pipe": self._pipe}
            names = list(both) if index % 2 else list(both)[::-1]
            found.append({n: both[n].serve(alone, callers=1).answers[0].latency for n in names})
        return found


def _takes_part(peer: Peer, scenario: Scenario) -> bool:
    if scenario.batch_timeout is not None:
        return peer.batches
    return peer.is_darkroom or not scenario.stream


def _first_progress(process: PeerProcess) -> list[float]:
    """Seconds until lone requests report their first step."""
    load = Remote(partial(make_load, process.peer.wire, process.port, True))
    try:
        requests = [replace(r, steps=LONE_STEPS) for r in mixed(STREAMS, seed=3)]
        answers = load.serve(requests, callers=1).answers
    finally:
        load.close()
    return [each.first_progress for each in answers if each.first_progress is not None]


def _model_of(port: int) -> model_pb2.Model:
    """The model as Darkroom's server describes it."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        model: model_pb2.Model = stub.GetModel(model_pb2.GetModelRequest(), timeout=10).model
    return model


def _check_form(process: PeerProcess) -> None:
    """Raise ``RuntimeError`` if Darkroom's denoiser has not the form that is to be measured."""
    wanted = DenoiserForm.COMPILED if process.peer.compiled else DenoiserForm.EAGER
    if (form := _model_of(process.port).runtime.denoiser) != wanted:
        raise RuntimeError(f"its denoiser is {form} and not {wanted}")


def info_of(source: ModelSource, **options: Any) -> ModelInfo:
    """The model as Darkroom's engine loads it; its dtype and layouts are those of all peers.

    ``options`` are further ones of the engine.
    """
    config = EngineConfig(models=(source,), max_rows=2 * MAX_BATCH_IMAGES, **options)
    engine = Remote(partial(make_engine, config))
    engine.close()
    if engine.info is None:
        raise RuntimeError("the engine reported no model")
    return engine.info


def _compiled_file(source: ModelSource) -> str:
    """The file of the denoiser of ``source``, compiled now or earlier.

    Raises ``RuntimeError`` if it cannot be compiled.
    """
    folder = WORK / "state" / "compiled"
    info = info_of(source, compile=Compile.BLOCKING, compile_cache=str(folder))
    if info.runtime.denoiser is not DenoiserForm.COMPILED:
        raise RuntimeError("the denoiser was not compiled; the log above says why")
    files = list(folder.glob("*.pt2"))
    if len(files) > 1:
        raise RuntimeError(f"{folder} has the denoisers of several models: remove it")
    return str(files[0])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
