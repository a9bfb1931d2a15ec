"""The server of the overload benchmark: unchanged, or first come, first served.

``python -m bench.serving.first_come_server PORT [--first-come]``. With ``--first-come`` no job is
rejected for its deadline.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

from darkroom_server import app
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.job import Job
from darkroom_server.dispatch import ActiveJob, Dispatcher
from darkroom_server.logs import configure_logs
from darkroom_server.settings import Dispatch, Logs, Models, Network, Settings

NO_PATIENCE = 1000
"""A priority so high that the patience is zero: the goal of a job is then its arrival."""


class FirstCome(Dispatcher):
    """Serves in the order of arrival; the engine orders by the same jobs."""

    def submit(self, job: Job, caller: Caller = ANONYMOUS) -> ActiveJob:
        """Accept ``job`` behind all earlier ones."""
        return super().submit(replace(job, priority=NO_PATIENCE), caller)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="bench.serving.first_come_server", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--first-come", action="store_true")
    parser.add_argument("--model", help="a pipeline folder; default: the demo model")
    options = parser.parse_args(arguments)
    settings = Settings(
        models=Models(model=(f"demo={options.model}",) if options.model else ()),
        network=Network(port=options.port, metrics_port=0),
        dispatch=Dispatch(early_refusal=not options.first_come),
    )
    configure_logs(Logs(log_level="error"))
    with patch.object(app, "Dispatcher", FirstCome if options.first_come else Dispatcher):
        app.run(settings)


if __name__ == "__main__":
    main()
