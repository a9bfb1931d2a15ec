"""Configures logging: format, level, and standard error as the destination."""

import faulthandler
import logging
import os
import select
import sys
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any, TextIO

import structlog

from darkroom_server.settings import Logs

log = structlog.get_logger(__name__)

MAX_QUEUED_CHARACTERS = 4 << 20
"""About 10,000 lines; further ones are dropped until the reader of the log continues."""

FLUSH_SECONDS = 2.0
"""How long the end of the process waits for a reader of the log that has stalled."""


MAX_NATIVE_LINE = 4096
"""Bytes; the rest of a longer line is a line of its own."""


class LogWriter(logging.Handler):
    """Writes log lines to ``stream`` on a thread of its own: a stalled reader delays no caller.

    The queue is bounded; ``dropped`` is the number of lines that found no room in it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = stream.fileno()
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
                self._write_bytes(line.encode(errors="backslashreplace"))
            except OSError:
                self.dropped += 1  # The reader has closed the pipe.
            self._written += len(line)

    def _write_bytes(self, data: bytes) -> None:
        # Not the stream's own methods: they hold its lock while they wait, and the interpreter
        # flushes the stream at its exit.
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])


NATIVE_BURST = 20
NATIVE_LINES_PER_SECOND = 1.0
"""A token bucket: strangers can make gRPC's core write thousands of lines a second."""


def capture_native_lines() -> TextIO:
    """Put what native code writes to descriptor 2 into our own log, at a limited rate.

    gRPC's core writes there, in its own format. Returns a stream to the real standard error, which
    replaces ``sys.stderr``. The last line of a process that aborts in native code is lost;
    ``faulthandler`` writes the Python stack instead.
    """
    sys.stderr.flush()
    real = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = real
    faulthandler.enable(real)
    Thread(target=_log_native_lines, args=(reading,), name="native-log", daemon=True).start()
    return real


def _log_native_lines(descriptor: int) -> None:
    tokens, then, suppressed = float(NATIVE_BURST), time.monotonic(), 0
    with open(descriptor, "rb") as lines:
        # A limit, because native code need not end its lines.
        while line := lines.readline(MAX_NATIVE_LINE):
            now = time.monotonic()
            tokens = min(NATIVE_BURST, tokens + (now - then) * NATIVE_LINES_PER_SECOND)
            then = now
            if tokens < 1.0:
                suppressed += 1
                continue
            tokens -= 1.0
            text = line.decode(errors="replace").rstrip()
            log.warning("native code logs", line=text, suppressed_before=suppressed)
            suppressed = 0


def _event_first(_: object, __: str, entry: structlog.typing.EventDict) -> Any:
    first = {key: entry.pop(key) for key in ("timestamp", "level", "event") if key in entry}
    return {**first, **entry}


def configure_logs(settings: Logs, stream: TextIO | None = None) -> LogWriter:
    """Send our log lines, and those of libraries that use ``logging``, to ``stream``.

    None is standard error.
    """
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
    handler = LogWriter(stream or sys.stderr)
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
