"""A server of a fleet with timed steps: ``python cancel_server.py LEDGER NAME STEP_SECONDS``.

It logs JSON to stdout, its engine with the time of a clock that all processes share: "started" when
a job takes its first step, "reached" when it is asked to remove one, "removed" when it has.
"""

import sys
import time
from collections.abc import Callable

import structlog

from darkroom_server.app import run
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.events import Event, JobCancelled, JobStarted
from darkroom_server.settings import Network, Settings, Storage

log = structlog.get_logger()


class TimedEngine(FakeEngine):
    """Logs when jobs start and when they are removed."""

    def start(self, emit: Callable[[Event], None]) -> None:
        """As ``Engine.start``."""

        def timed(event: Event) -> None:
            match event:
                case JobStarted(job_id=job):
                    logged("started", job)
                case JobCancelled(job_id=job):
                    logged("removed", job)
            emit(event)

        super().start(timed)


def logged(event: str, job: str) -> None:
    """Log that something has happened to a job now."""
    log.info(event, job=job, at=time.monotonic())


def main(ledger: str, name: str, step_seconds: str) -> None:
    """Serve until SIGTERM."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(20),
        processors=[structlog.processors.JSONRenderer()],
    )
    engine = TimedEngine(
        pass_seconds=float(step_seconds), on_cancel=lambda job: logged("reached", job)
    )
    network = Network(port=0, metrics_port=0, server_id=name)
    run(Settings(network=network, storage=Storage(ledger=ledger)), [engine])


if __name__ == "__main__":
    main(*sys.argv[1:])
