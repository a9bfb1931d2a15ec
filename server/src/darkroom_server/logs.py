"""Configures logging: format, level, and standard error as the destination."""

import logging
import sys
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any, TextIO

import structlog

from darkroom_server.settings import Logs

MAX_QUEUED_CHARACTERS = 4 << 20
"""About 10,000 lines; further ones are dropped until the reader of the log continues."""

FLUSH_SECONDS = 2.0
"""How long the end of the process waits for a reader of the log that has stalled."""


class LogWriter(logging.Handler):
    """Writes log lines to ``stream`` on a thread of its own: a stalled reader delays no caller.

    The queue is bounded; ``dropped`` is the number of lines that found no room in it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.dropped = 0
        self._stream = stream
        # Reentrant: a signal handler may log while its own thread does.
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._queued = 0
        self._written = 0
        """Characters in total; each of the two is changed by one side only."""
        Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format ``record`` here, where its context variables are, and queue the line."""
        try:
            line = self.format(record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Not ``handleError``, which writes to standard error itself.
            line = f"a log line of {record.name} cannot be formatted: {error}"
        self.put(line)

    def put(self, line: str) -> None:
        """Queue one line, or drop it."""
        self.acquire()
        try:
            if self._queued - self._written + len(line) > MAX_QUEUED_CHARACTERS:
                self.dropped += 1
                return
            self._queued += len(line) + 1
            self._queue.put(line + "\n")
        finally:
            self.release()

    def flush(self) -> None:
        """Wait until everything is written, for at most ``FLUSH_SECONDS``."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._written < self._queued and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            line = self._queue.get()
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):
                self.dropped += 1  # The reader has closed the pipe, or the stream is closed.
            self._written += len(line)


def _event_first(_: object, __: str, entry: structlog.typing.EventDict) -> Any:
    first = {key: entry.pop(key) for key in ("timestamp", "level", "event") if key in entry}
    return {**first, **entry}


def configure_logs(settings: Logs) -> LogWriter:
    """Send our log lines, and those of libraries that use ``logging``, to standard error."""
    json = settings.log_format == "json" or (
        settings.log_format == "auto" and not sys.stderr.isatty()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json:
        shared += [structlog.processors.format_exc_info, _event_first]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # Not rich's formatter: it prints local variables, which include prompts and tokens.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = LogWriter(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    return handler
