"""The engine's process, whose loads take as long as those of real models.

The thread that reads a model waits first, for as long as ``LoadCosts`` says.
"""

import os
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from bench.report.results import ROOT
from bench.trace.costs import LoadCosts
from darkroom_server.core.events import Event
from darkroom_server.engine import main as engine
from darkroom_server.ipc.channel import Channel

VARIABLE = "BENCH_TRACE_LOADS"
"""The environment variable with the scale of the costs."""


def environment(scale: float) -> dict[str, str]:
    """The variables of a process that starts this one, which imports this module."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: f"{scale}", "PYTHONPATH": os.pathsep.join(paths)}


def main() -> None:
    """Run an engine for the parent at the other end of the pipe."""
    costs = LoadCosts(float(os.environ[VARIABLE]))
    run = engine.run

    def run_slowly(channel: Channel, emit: Callable[[Event], None]) -> None:
        # Torch may only be imported here.
        from darkroom_server.engine.catalogue.loader import ModelLoader

        read = ModelLoader._read

        def wait_and_read(self: ModelLoader, command: Any, *rest: Any) -> None:
            in_host = self.store.held(command.source.id) is not None
            time.sleep(costs.cost(in_host=in_host, host_only=command.host_only))
            read(self, command, *rest)

        with patch.object(ModelLoader, "_read", wait_and_read):
            run(channel, emit)

    with patch.object(engine, "run", run_slowly):
        engine.main()


if __name__ == "__main__":
    main()
