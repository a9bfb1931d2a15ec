"""The main function of the engine's process.

Started as ``python -m darkroom_server.engine.main DESCRIPTOR PARENT``: the file descriptor of this
process's end of the pipe, and the process id of the serving process. Torch is imported in ``run``
only, so that importing this module stays cheap.
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
from darkroom_server.core.exhaustion import is_exhaustion
from darkroom_server.core.job import Job
from darkroom_server.engine.device.malloc import keep_freed_memory
from darkroom_server.engine.device.spinning import Spinning, sleep_if_unwatched
from darkroom_server.ipc.channel import Channel, ChannelClosed
from darkroom_server.ipc.commands import (
    Cancel,
    CheckAdapter,
    Close,
    DescribeModels,
    Extend,
    LoadModel,
    OfferAdapter,
    UnloadModel,
    WithdrawAdapter,
)
from darkroom_server.ipc.event_batcher import EventBatcher

log = structlog.get_logger(__name__)

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run an engine for the parent at the other end of the pipe."""
    # The parent coordinates the shutdown: Ctrl-C and a supervisor's SIGTERM reach both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(parent=int(sys.argv[2]))
    keep_freed_memory()
    sleep_if_unwatched()
    log_lines()
    channel = Channel(int(sys.argv[1]))
    batcher = EventBatcher(channel)
    try:
        run(channel, batcher.emit)
    except ChannelClosed:
        os._exit(1)  # The parent is gone, and threads may hang.
    except Exception:
        log.exception("engine died")
        # Through the batcher: the steps that it holds were taken, and are sent first.
        batcher.emit(EngineDied("the engine died; the log above says why"))


def run(channel: Channel, emit: Callable[[Event], None]) -> None:
    """Load what the first message configures, then run jobs until ``Close`` arrives."""
    config: EngineConfig = channel.receive()
    from darkroom_server.engine.loading.startup import start_loop

    Spinning.start()  # Now that torch has loaded OpenMP.
    try:
        loop, ready = start_loop(config, emit)
    except StartupError as error:
        exhausted = is_exhaustion(error)
        emit(EngineDied(str(error), fatal=not exhausted, exhausted=exhausted))
        return
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        log.exception("engine cannot start")
        emit(EngineDied(f"the engine cannot start: {error}", exhausted=True))
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
                    case CheckAdapter() | OfferAdapter() | WithdrawAdapter() as change:
                        loop.change_adapters(change)
                    case LoadModel() | UnloadModel() | DescribeModels() as model_change:
                        loop.change_models(model_change)
                    case Close():
                        loop.close()
        except ChannelClosed:
            os._exit(1)  # The parent died; do not wait for the current batch.
        except Exception:
            # Without this thread, every later job would wait forever.
            log.exception("message from the server cannot be read")
            os._exit(1)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    loop.run()


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the parent thread exits (PR_SET_PDEATHSIG).

    ``parent`` is the id of that thread's process. It is passed because it cannot be guessed: in a
    container the parent may be process 1, which orphans get as their parent too.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # The parent died before the call above.


def log_lines() -> None:
    """Log every level as JSON lines; the parent filters by level."""
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
