"""The server of the trace: ours, with the policy exchanged and with loads as long as real ones.

``python -m bench.trace.server CONFIG``, in JSON. It writes what the loads cost when it stops.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from unittest.mock import patch

from bench.trace.costs import LoadCosts
from bench.trace.engine_child import environment
from bench.trace.figures import Swaps
from bench.trace.policies import Policy, dispatcher_of, exchanged
from darkroom_server import app
from darkroom_server.backends import process
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import Compile, EngineConfig
from darkroom_server.core.events import Event
from darkroom_server.core.job import Job
from darkroom_server.core.model_events import ModelInHost, ModelLoaded
from darkroom_server.logs import configure_logs
from darkroom_server.settings import Dispatch, Engine, Logs, Models, Network, Settings
from darkroom_server.settings.adapters import Adapters
from darkroom_server.settings.sources import DEMO_ADAPTERS, engine_configs

CHILD = ("-P", "-m", "bench.trace.engine_child")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """``models`` is the folder of models, and ``swaps`` the file for what the loads cost.

    ``weight_bytes`` are those of one model; the device holds ``device_models`` of them.
    """

    port: int
    models: str
    policy: Policy
    swaps: str
    weight_bytes: int
    device_models: int
    host_models: int
    load_scale: float
    swap_wait: float

    def arguments(self) -> list[str]:
        """The command line of the server's process."""
        return [json.dumps(asdict(self))]

    @classmethod
    def of_command_line(cls) -> Self:
        """The inverse of ``arguments``."""
        parser = argparse.ArgumentParser(prog="bench.trace.server", description=__doc__)
        parser.add_argument("config", help="JSON")
        fields = json.loads(parser.parse_args().config)
        return cls(**{**fields, "policy": Policy(fields["policy"])})


class WatchedEngine(ProcessEngine):
    """Counts the loads in ``costs``, and how long jobs waited for their models."""

    def __init__(self, config: EngineConfig, costs: LoadCosts) -> None:
        super().__init__(config)
        self._costs = costs
        self._loaded_at: dict[str, float] = {}
        self.longest_wait = 0.0

    def start(self, emit: Callable[[Event], None]) -> None:
        """Start the engine; see ``ProcessEngine``."""

        def tap(event: Event) -> None:
            if isinstance(event, ModelLoaded):
                self._loaded_at[event.info.id] = time.monotonic()
                self._costs.record(in_host=event.load.origin is WeightOrigin.HOST)
            elif isinstance(event, ModelInHost):
                self._costs.record(host_only=True)
            emit(event)

        super().start(tap)

    def submit(self, job: Job) -> None:
        """Run a job, whose model is in memory."""
        waited = self._loaded_at[job.model] - job.submitted_at
        self.longest_wait = max(self.longest_wait, waited)
        super().submit(job)


def main() -> None:
    """Serve until SIGTERM."""
    config = ServerConfig.of_command_line()
    costs = LoadCosts(config.load_scale)
    os.environ.update(environment(config.load_scale))
    process.CHILD = CHILD
    loras = sorted((DEMO_ADAPTERS / "loras").glob("*.safetensors"))
    settings = Settings(
        models=Models(
            models_dir=config.models,
            # The weights of all models are equal in number, and measured to a byte or so.
            device_memory_budget=round((config.device_models + 0.5) * config.weight_bytes),
            # On a CPU the host's memory keeps those that are not on the device.
            host_memory_budget=round(
                (config.host_models - config.device_models + 0.5) * config.weight_bytes
            ),
            swap_wait=config.swap_wait,
        ),
        adapters=Adapters(lora=tuple(f"{file.stem}={file}" for file in loras)),
        engine=Engine(compile=Compile.OFF),
        network=Network(port=config.port, metrics_port=0),
        dispatch=Dispatch(
            early_refusal=False, max_queued_jobs=100_000, max_queued_megapixel_steps=1e12
        ),
    )
    configure_logs(Logs(log_level="error"))
    engines = [WatchedEngine(each, costs) for each in engine_configs(settings, None)]
    try:
        with (
            exchanged(config.policy, costs),
            patch.object(app, "Dispatcher", dispatcher_of(config.policy)),
        ):
            app.run(settings, engines)
    finally:
        swaps = Swaps(
            loads=costs.loads,
            from_disk=costs.from_disk,
            bytes_moved=costs.bytes_moved,
            seconds=costs.seconds,
            longest_wait=max(engine.longest_wait for engine in engines),
        )
        Path(config.swaps).write_text(json.dumps(asdict(swaps)), encoding="utf-8")


if __name__ == "__main__":
    main()
