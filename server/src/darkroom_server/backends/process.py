"""The engine in a process of its own, seen from the serving process, which has no torch."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import structlog

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import (
    EngineDied,
    EngineReady,
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    MemoryReport,
)
from darkroom_server.core.job import Job
from darkroom_server.ipc.channel import Channel, ChannelClosed
from darkroom_server.ipc.commands import Cancel, Close, Extend

log = structlog.get_logger(__name__)

CHILD = ("-P", "-m", "darkroom_server.engine.main")
"""What Python runs in the engine's process; -P: no modules from the folder it is started in."""

CLOSE_SECONDS = 10.0
"""How long a pass may take to end on ``close``, before its process is killed."""


class ProcessEngine:
    """Spawns the engine's process, talks to it, and notices when it dies or hangs.

    After ``EngineDied`` it can be started again. The thread that calls ``start`` must outlive the
    process: the kernel ends the process with that thread.
    ``timeout`` is the longest silence, in seconds, while there is work.
    """

    def __init__(self, config: EngineConfig, *, timeout: float = 60.0) -> None:
        self._config = config
        self._timeout = timeout
        self._life: _EngineProcess | None = None

    @property
    def pid(self) -> int | None:
        """The process's id, None where there is none."""
        return self._life.process.pid if self._life else None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Spawn the process and begin to load; ``EngineReady`` or ``EngineDied`` follows."""

        def settle(event: Event) -> None:
            if isinstance(event, EngineReady):
                self._config = self._config.with_measurements(event.models)
            emit(event)

        self._life = _EngineProcess(self._config, self._timeout, settle)

    def submit(self, job: Job) -> None:
        """Take a job. Legal once ``EngineReady`` was told."""
        if self._life is None:
            raise RuntimeError("the engine was not started")
        self._life.submit(job)

    def cancel(self, job_id: str) -> None:
        """Drop a job at the next step boundary."""
        if self._life is not None:
            self._life.tell(Cancel(job_id))

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Give a job until ``deadline`` instead."""
        if self._life is not None:
            self._life.tell(Extend(job_id, deadline))

    def close(self) -> None:
        """Stop after the current pass; a process that does not is killed."""
        if self._life is not None:
            self._life.close()
            self._life = None


class _EngineProcess:
    """One process, from its spawning to its end."""

    def __init__(self, config: EngineConfig, timeout: float, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._timeout = timeout
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._working: set[str] = set()
        self._last_heard = time.monotonic()
        self._closing = False
        self._ready = False
        self._silent = False
        self._over = threading.Event()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(
                [sys.executable, *CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._channel = Channel(ours.detach())
        self._threads: list[threading.Thread] = []
        self.tell(config)
        try:
            for target in (self._log, self._send, self._listen, self._watch):
                thread = threading.Thread(target=target, name="engine-process", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # No thread to spare.
            self._closing = True
            self.process.kill()
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Send a job; from now on silence is counted."""
        if not self._working:
            self._last_heard = time.monotonic()
        self._working.add(job.id)
        self.tell(job)

    def tell(self, message: object) -> None:
        """Send ``message`` from a thread that may wait: a stopped process fills the pipe."""
        self._outbox.put(message)

    def close(self) -> None:
        """End the process, by its own will where that takes no longer than ``CLOSE_SECONDS``.

        One that still loads hears nothing, and has nothing to lose.
        """
        self._closing = True
        self._over.set()
        if not self._ready:
            self.process.kill()
        self.tell(Close())
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._channel.send(message)
            except ChannelClosed:
                return  # The process is gone; the listening thread tells of it.

    def _watch(self) -> None:
        """Kill an engine that has work and is silent for too long.

        On a thread of its own: those that send and listen may both be in the middle of a message.
        """
        while not self._over.wait(self._silence_left()):
            if self._working and self._silence_left() <= 0:
                self._silent = True
                self.process.kill()
                return

    def _listen(self) -> None:
        died = EngineDied("the engine's process died")
        try:
            for event in self._told():
                if not isinstance(event, MemoryReport):  # A thread of its own tells those.
                    self._last_heard = time.monotonic()
                if isinstance(event, EngineReady):
                    self._ready = True
                if isinstance(event, JobFinished | JobFailed | JobCancelled):
                    self._working.discard(event.job_id)
                if isinstance(event, EngineDied):
                    died = event
                    break
                self._emit(event)
        except ChannelClosed:
            pass  # Said below, with how the process ended.
        except Exception:
            # What cannot be read, or told: this thread must not end without a word on it.
            log.exception("the engine's events cannot be taken")
        self._over.set()
        if self._closing:
            return
        # It may hang on its way out, with a device that is lost.
        self.process.kill()
        code = self.process.wait()
        self._outbox.put(None)
        self._channel.close()
        if self._silent:
            died = EngineDied(f"the engine was silent for {self._timeout:g} s, and was killed")
        log.error("engine died", message=died.message, exit_code=code)
        self._emit(died)

    def _told(self) -> Iterator[Event]:
        """What the process tells, until it is gone: then ``ChannelClosed``."""
        while True:
            message = self._channel.receive()
            yield from message if isinstance(message, tuple) else (message,)

    def _silence_left(self) -> float:
        if not self._working:
            return self._timeout
        return max(0.0, self._last_heard + self._timeout - time.monotonic())

    def _log(self) -> None:
        """Put the process's log, and whatever else it writes to stderr, into our own."""
        stream: IO[bytes] | None = self.process.stderr
        if stream is None:
            return
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                try:
                    record = json.loads(line)
                    level, event = record.pop("level"), record.pop("event")
                    record.pop("timestamp", None)
                except (ValueError, KeyError, AttributeError, TypeError):
                    log.warning("engine says", line=line, pid=self.process.pid)
                    continue
                getattr(log, level, log.info)(event, **record, pid=self.process.pid)
