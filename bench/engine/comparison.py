"""Serves the same requests by each peer: ``pipe()``, ``pipe()`` on static batches, the engine."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from bench.engine.report import NAMES, images_per_second
from bench.inprocess.engine import make_engine
from bench.inprocess.pipelines import make_pipelines
from bench.inprocess.remote import MAX_BATCH_IMAGES, Remote
from bench.report.machine import model_source
from bench.report.results import Run
from bench.workload.requests import Request, mixed
from darkroom_server.core.engine_config import EngineConfig, Preset

CALLERS = 8
NOMINAL_STEPS = 20
LONE_STEPS = 16
MIN_BATCHES = 10
"""Row counts with fewer batches are not reported."""


class Comparison:
    """The three peers, each in a process of its own, and their runs so far."""

    def __init__(self, model: str | None, preset: Preset = Preset.AUTO) -> None:
        source = model_source(model)
        config = EngineConfig(models=(source,), rows=2 * MAX_BATCH_IMAGES, preset=preset)
        engine = Remote(partial(make_engine, config))
        if engine.info is None:
            raise RuntimeError("the engine reported no model")
        self.info = engine.info
        runtime = self.info.runtime
        self.peers = {
            "serial": Remote(partial(make_pipelines, source.location, runtime, 1)),
            "static": Remote(partial(make_pipelines, source.location, runtime, MAX_BATCH_IMAGES)),
            "engine": engine,
        }
        self.runs: list[Run] = []
        self._batch_times: list[tuple[int, float]] = []
        for peer in self.peers.values():
            peer.warm_up()

    def compete(
        self,
        scenario: str,
        round: int,
        requests: Sequence[Request],
        *,
        rate: float | None = None,
        callers: int | None = None,
        peers: Sequence[str] = tuple(NAMES),
    ) -> None:
        """Let each of ``peers`` serve ``requests``; which one is first changes each time."""
        names = list(peers)
        turn = len(self.runs) // len(names) % len(names)
        for name in names[turn:] + names[:turn]:
            before = self.nominal()
            report = self.peers[name].serve(requests, callers)
            self._batch_times += report.batch_times
            run = Run(
                scenario=scenario,
                peer=name,
                round=round,
                nominal_before=before,
                nominal_after=self.nominal(),
                answers=report.answers,
                rate=rate,
                callers=callers,
            )
            self.runs.append(run)
            print(f"{scenario} round {round} {name}: {run.seconds:.1f} s", flush=True)

    def nominal(self) -> float:
        """Seconds of a step of a lone request: the current speed of the machine."""
        requests = [replace(r, steps=NOMINAL_STEPS) for r in mixed(3, seed=0)]
        answers = self.peers["serial"].serve(requests, callers=1).answers
        return statistics.median(each.latency for each in answers) / NOMINAL_STEPS

    def capacity(self, name: str) -> float:
        """Images/s of the peer ``name`` in the closed loops so far."""
        return images_per_second([r for r in self.runs if (r.scenario, r.peer) == ("closed", name)])

    def lone(self, pairs: int, steps: int = LONE_STEPS) -> list[dict[str, float]]:
        """Seconds of one request alone in the engine and in ``pipe()``, in alternating order."""
        found = []
        for index, request in enumerate(mixed(pairs, seed=1)):
            alone = [replace(request, steps=steps)]
            names = ("engine", "serial") if index % 2 else ("serial", "engine")
            seconds = {n: self.peers[n].serve(alone, callers=1).answers[0].latency for n in names}
            found.append({"engine": seconds["engine"], "pipe": seconds["serial"]})
        return found

    def batch_medians(self) -> list[dict[str, float]]:
        """Milliseconds of the engine's batches, by their rows."""
        by_rows: dict[int, list[float]] = {}
        for rows, seconds in self._batch_times:
            by_rows.setdefault(rows, []).append(seconds)
        return [
            {"rows": rows, "milliseconds": statistics.median(s) * 1000, "count": len(s)}
            for rows, s in sorted(by_rows.items())
            if len(s) >= MIN_BATCHES
        ]

    def close(self) -> None:
        """End the peers' processes."""
        for peer in self.peers.values():
            peer.close()
