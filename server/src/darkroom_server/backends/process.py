"""The process backend: spawns and watches an engine process; the serving process has no torch."""

import json
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import IO

import structlog

from darkroom_server.backends.descriptors import reserved_descriptors
from darkroom_server.backends.load_limit import LoadLimit
from darkroom_server.core.engine_config import AdapterSource, EngineConfig, ModelSource
from darkroom_server.core.events import (
    Correction,
    EngineDied,
    EngineReady,
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    MemoryReport,
)
from darkroom_server.core.job import Job
from darkroom_server.core.model_events import ModelInHost, ModelLoaded, ModelNotLoaded
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

log = structlog.get_logger(__name__)

CHILD = ("-P", "-m", "darkroom_server.engine.main")
"""Python's arguments for the engine process; -P: import nothing from the working directory."""

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variables that configure torch's allocator of GPU memory; only old versions need the first.

If none is set, its segments grow. Otherwise images of many sizes leave gaps between them that no
batch fits.
"""

CLOSE_SECONDS = 10.0
"""Time for the current batch to finish on ``close``, before the process is killed."""

REAP_SECONDS = 10.0
"""Time for a killed process to end. With a lost GPU it may wait for the driver and never end."""


class ProcessEngine:
    """Spawns the engine process, exchanges messages with it, and detects that it died or hangs.

    It can be started again after ``EngineDied``. The thread that calls ``start`` must outlive the
    process, because the kernel kills the process when that thread exits (PR_SET_PDEATHSIG).
    ``timeout`` is the longest time without an event, in seconds, while there is work.
    ``load_timeout``: the longest time, in seconds, from the start to ``EngineReady``; after the
    first load ``LoadLimit`` shortens it. After restarts that failed, it starts without models, see
    ``EngineConfig.after_failed_restarts``.
    """

    def __init__(
        self, config: EngineConfig, *, timeout: float = 60.0, load_timeout: float = 1800.0
    ) -> None:
        self._config = config
        # What is offered now. Not in ``_config``, which the receiving thread replaces.
        self._offered = config
        self._timeout = timeout
        self._load_limit = LoadLimit(load_timeout)
        self._was_ready = False
        self._failed_restarts = 0
        self._process: _EngineProcess | None = None

    @property
    def pid(self) -> int | None:
        """The process id, None if there is no process."""
        return self._process.process.pid if self._process else None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Spawn the process and start to load; ``EngineReady`` or ``EngineDied`` follows."""
        began = time.monotonic()

        def learn(event: Event) -> None:
            if isinstance(event, EngineReady):
                self._config = self._config.with_measurements(event.models, event.device)
                self._load_limit.loaded(time.monotonic() - began)
                self._was_ready, self._failed_restarts = True, 0
            elif isinstance(event, EngineDied):
                if process.load_timed_out:
                    self._load_limit.timed_out()
                if self._was_ready and not process.ready and not event.exhausted:
                    self._failed_restarts += 1
            elif isinstance(event, ModelLoaded):
                self._config = self._config.with_measurements((event.info,))
            elif isinstance(event, Correction):
                self._config = self._config.with_correction(event)
            emit(event)

        offered = self._offered = self._offered.after_failed_restarts(self._failed_restarts)
        config = replace(
            self._config,
            adapters=offered.adapters,
            models=offered.models,
            catalogue=offered.catalogue,
        )
        process = _EngineProcess(config, self._timeout, self._load_limit.seconds)
        with reserved_descriptors():
            process.start(learn)
        self._process = process

    def submit(self, job: Job) -> None:
        """Run a job; allowed after ``EngineReady``."""
        if self._process is None:
            raise RuntimeError("the engine was not started")
        self._process.submit(job)

    def cancel(self, job_id: str) -> None:
        """Cancel a job at the next step boundary."""
        if self._process is not None:
            self._process.send(Cancel(job_id))

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Replace a job's deadline."""
        if self._process is not None:
            self._process.send(Extend(job_id, deadline))

    def check_adapter(self, source: AdapterSource) -> None:
        """Find the models that an adapter fits; ``AdapterChecked`` follows if the engine runs."""
        if self._process is not None:
            self._process.send(CheckAdapter(source))

    def offer_adapter(self, source: AdapterSource) -> None:
        """Let later jobs use an adapter, also after a restart."""
        self._offered = self._offered.with_adapter(source)
        if self._process is not None:
            self._process.send(OfferAdapter(source))

    def withdraw_adapter(self, id: str) -> None:
        """Free an adapter's memory once no job uses it. A job that comes later may still."""
        self._offered = self._offered.without_adapter(id)
        if self._process is not None:
            self._process.send(WithdrawAdapter(id))

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        """Load a model of the catalogue while jobs run, or read it into the host's memory."""
        if self._process is not None:
            measured = {info.id: info for info in self._config.previous_measurements}
            offered = self._offered
            source, adapters = offered.source_of(id), offered.adapters
            command = LoadModel(source, adapters, measured.get(id), keep, host_only)
            self._process.load(command, self._load_limit.longest)

    def unload_model(self, id: str, *, keep: bool = False) -> None:
        """Free a model's memory once no job uses it; a later start does not load it either."""
        self._offered = self._offered.on_demand(id)
        if self._process is not None:
            self._process.send(UnloadModel(id, keep))

    def describe_models(self, sources: Sequence[ModelSource]) -> None:
        """Add models to the catalogue, also after a restart."""
        self._offered = self._offered.with_models(sources)
        if self._process is not None:
            self._process.send(DescribeModels(tuple(sources), self._offered.adapters))

    def forget_models(self, ids: Collection[str]) -> None:
        """Remove models from the catalogue that are not in memory."""
        self._offered = self._offered.without_models(ids)

    def close(self) -> None:
        """Stop after the current batch; a process that does not is killed."""
        if self._process is not None:
            self._process.close()
            self._process = None


def _environment() -> dict[str, str]:
    """The environment of an engine's process: this one's, and what this one does not set."""
    defaults = {}
    if not any(name in os.environ for name in ALLOCATOR):
        defaults[ALLOCATOR[0]] = "expandable_segments:True"
    return {**defaults, **os.environ}


class _EngineProcess:
    """One process, from its start to its end; ``ready``: it has loaded."""

    def __init__(self, config: EngineConfig, timeout: float, load_timeout: float) -> None:
        self._config = config
        self._timeout = timeout
        self._load_timeout = load_timeout
        self._to_send: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._working: set[str] = set()
        self._started_at = self._last_event_at = time.monotonic()
        self._closing = False
        self.ready = False
        self._timed_out = False
        self._load_until: dict[str, float] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, emit: Callable[[Event], None]) -> None:
        """Spawn the process; its events go to ``emit`` on another thread.

        Raises ``OSError`` or ``RuntimeError`` if that fails, and leaves nothing behind.
        """
        self._emit = emit
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(
                [sys.executable, *CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
            )
            self._channel = Channel(ours.detach())
        self.send(self._config)
        try:
            for target in (self._log, self._send_all, self._receive, self._watch):
                thread = threading.Thread(target=target, name="engine-process", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # The limit of threads is reached.
            self._closing = True
            self.process.kill()
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Send a job; from now on the process must emit events."""
        if not self._working:
            self._last_event_at = time.monotonic()
        self._working.add(job.id)
        self.send(job)

    def load(self, command: LoadModel, seconds: float) -> None:
        """Send ``command``; the load must end within ``seconds``."""
        self._load_until[command.source.id] = time.monotonic() + seconds
        self.send(command)

    def send(self, message: object) -> None:
        """Send ``message`` on another thread, which blocks if a stopped process fills the pipe."""
        self._to_send.put(message)

    def close(self) -> None:
        """Ask the process to end, and kill it after ``CLOSE_SECONDS``.

        A process that still loads is killed at once: it reads no commands and has no jobs.
        """
        self._closing = True
        self._over.set()
        if not self.ready:
            self.process.kill()
        self.send(Close())
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            if self._reap() is None:
                return  # Its threads wait for it, and end with this process.
        self._to_send.put(None)
        for thread in self._threads:
            thread.join()
        self._channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _reap(self) -> int | None:
        """The exit code of the process, which was killed; None if it does not end."""
        try:
            return self.process.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            log.error(
                "the engine's process was killed and does not end; its GPU may be lost",
                pid=self.process.pid,
                seconds=REAP_SECONDS,
            )
            return None

    def _send_all(self) -> None:
        while (message := self._to_send.get()) is not None:
            try:
                self._channel.send(message)
            except ChannelClosed:
                return  # The process is gone; the receiving thread reports it.

    @property
    def load_timed_out(self) -> bool:
        """The process was killed because it did not finish to load."""
        return self._timed_out and not self.ready

    def _watch(self) -> None:
        """Kill a process that loads for too long, or has work and emits no event for too long.

        On a thread of its own, because the sending and the receiving thread may both be blocked.
        """
        # Jobs may arrive meanwhile, and ``_timeout`` seconds later the first of them may be due.
        while not self._over.wait(min(self._timeout, self._seconds_until_timeout())):
            if self._seconds_until_timeout() <= 0:
                self._timed_out = True
                self.process.kill()
                return

    def _receive(self) -> None:
        died = EngineDied("the engine's process died")
        try:
            for event in self._events():
                if not isinstance(event, MemoryReport):  # Emitted by another thread of the process.
                    self._last_event_at = time.monotonic()
                if isinstance(event, EngineReady):
                    self.ready = True
                if isinstance(event, ModelLoaded):
                    self._load_until.pop(event.info.id, None)
                elif isinstance(event, ModelInHost):
                    self._load_until.pop(event.load.model, None)
                elif isinstance(event, ModelNotLoaded):
                    self._load_until.pop(event.model, None)
                if isinstance(event, JobFinished | JobFailed | JobCancelled):
                    self._working.discard(event.job_id)
                if isinstance(event, EngineDied):
                    died = event
                    break
                self._emit(event)
        except ChannelClosed:
            pass  # Logged below, with the exit code.
        except Exception:
            # The message is unreadable, or ``emit`` failed: this thread must not end silently.
            log.exception("the engine's events cannot be handled")
        self._over.set()
        if self._closing:
            return
        # With a lost device, it may hang while it exits.
        self.process.kill()
        code = self._reap()
        self._to_send.put(None)
        self._channel.close()
        if self.load_timed_out:
            died = EngineDied(
                f"the engine had not loaded after {self._load_timeout:.3g} s, and was killed"
            )
        elif self._timed_out:
            died = EngineDied(f"the engine was silent for {self._timeout:g} s, and was killed")
        if code is None:
            died = replace(died, message=f"{died.message}; its process does not end")
        log.error("engine died", message=died.message, exit_code=code)
        self._emit(died)

    def _events(self) -> Iterator[Event]:
        """The events of the process. Raises ``ChannelClosed`` when it is gone."""
        while True:
            message = self._channel.receive()
            yield from message if isinstance(message, tuple) else (message,)

    def _seconds_until_timeout(self) -> float:
        if not self.ready:
            return max(0.0, self._started_at + self._load_timeout - time.monotonic())
        until = min(tuple(self._load_until.values()), default=math.inf)
        if self._working:
            until = min(until, self._last_event_at + self._timeout)
        return max(0.0, until - time.monotonic())

    def _log(self) -> None:
        """Copy the process's log, and other lines that it writes to stderr, into this log."""
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
                    log.warning("engine output", line=line, pid=self.process.pid)
                    continue
                getattr(log, level, log.info)(event, **record, pid=self.process.pid)
