"""The engine's own process: what runs in it, and how it ends.

Started as ``python -m darkroom_server.engine.main DESCRIPTOR PARENT``, where the descriptor is
its end of a pipe to the serving process, and the other its process id. Torch is imported inside
``run`` alone, so that nobody who needs a name of this module gets it too.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

import structlog

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineDied, Event
from darkroom_server.core.job import Job
from darkroom_server.engine.device.malloc import keep_freed_memory
from darkroom_server.ipc.channel import Channel, ChannelClosed
from darkroom_server.ipc.commands import Cancel, Close, Extend
from darkroom_server.ipc.event_batcher import EventBatcher

log = structlog.get_logger(__name__)

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run an engine for the parent at the other end of the pipe."""
    # The parent coordinates the end: Ctrl-C and a supervisor's SIGTERM reach both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(parent=int(sys.argv[2]))
    keep_freed_memory()
    log_lines()
    channel = Channel(int(sys.argv[1]))
    outbox = EventBatcher(channel)
    try:
        run(channel, outbox.tell)
    except ChannelClosed:
        os._exit(1)  # The parent is gone; nothing is left to do, and threads may hang.
    except Exception:
        log.exception("engine died")
        # After the steps that were not told yet: they were taken.
        outbox.tell(EngineDied("the engine died; the log above says why"))


def run(channel: Channel, emit: Callable[[Event], None]) -> None:
    """Load what the first message says, then develop jobs until told to stop."""
    config: EngineConfig = channel.receive()
    from darkroom_server.engine.loading.startup import start_loop

    try:
        loop, ready = start_loop(config, emit)
    except StartupError as error:
        emit(EngineDied(str(error), fatal=True))
        return
    emit(ready)

    def listen() -> None:
        try:
            while True:
                match channel.receive():
                    case Job() as job:
                        loop.submit(job)
                    case Cancel(job_id):
                        loop.cancel(job_id)
                    case Extend(job_id, deadline):
                        loop.extend(job_id, deadline)
                    case Close():
                        loop.close()
        except ChannelClosed:
            os._exit(1)  # The parent died, and a pass of a large model may take long.
        except Exception:
            # Deaf, it would let every later job wait for nothing.
            log.exception("a message of the server cannot be read")
            os._exit(1)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    loop.run()


def die_with(parent: int) -> None:
    """Let the kernel end this process with the thread that spawned it, be it ever so stuck.

    ``parent`` is that thread's process. In a container it may well be process 1, which is also
    where orphans go: so it is named, not guessed.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # The parent died before the call above.


def log_lines() -> None:
    """Write the log as JSON lines, all of them: the parent leaves out what nobody asked for."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    main()
