"""The server of the overload bench: as it is, or first come, first served, and nothing refused.

``python -m bench.overload_server PORT [--first-come]``
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
"""A priority at which no patience is left: goals are then the moments of arrival."""


class FirstCome(Dispatcher):
    """Serves in the order of arrival, as the engine does then too: it has the order from jobs."""

    def submit(self, job: Job, caller: Caller = ANONYMOUS) -> ActiveJob:
        """Accept ``job``, behind all that came before."""
        return super().submit(replace(job, priority=NO_PATIENCE), caller)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="bench.overload_server", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--first-come", action="store_true")
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
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
