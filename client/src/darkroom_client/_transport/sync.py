"""The blocking client's I/O: its channels, its calls and their cancellation."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.calls import upload_call
from darkroom_client._protocol.retries import Call, CallTries, NextCall, client_closed_error
from darkroom_client._protocol.rpc_errors import was_sent
from darkroom_client._protocol.session import GenerationSession
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata, Settings
from darkroom_client._transport.balanced import BalancedChannel
from darkroom_client._transport.channels import (
    CALLS_PER_PAIR,
    check_files,
    is_connected,
    new_balancer,
    open_control_channel,
    open_direct_channel,
    open_pair,
)
from darkroom_client._transport.server_address import server_address
from darkroom_client._transport.tls_probe import find_tls_problem

CANCEL_ON_EXIT_SECONDS = 2.0
"""The time limit of a cancel call, the lookup of the server's address included."""

STATUS_SECONDS = 5.0
"""How long a finished stream waits for the status of its call; then it cancels the call."""

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class _Pair:
    channels: tuple[grpc.Channel | BalancedChannel, grpc.Channel | BalancedChannel]
    stubs: Stubs
    # One object for each open call. gRPC's threads remove them: each step is atomic.
    calls: set[object] = field(default_factory=set)


class SyncTransport:
    """Makes calls; safe to share between threads, in the process of its first call.

    gRPC's threads do not survive a fork: calls over channels opened before it may hang. A forked
    child neither uses nor closes its parent's channels.

    ``_in_flight`` holds each job that the server would continue after a lost connection, from
    before its first call until its caller has the answer. Invariant: a job leaves ``_in_flight``
    only after its cancel, if it needs one, is in ``_cancels``. So ``close`` finds every job in one
    of the two. A job may be cancelled twice, which is harmless, but never zero times. This needs
    no lock, so signal handlers and finalizers may run ``finish`` and ``close`` at any moment: each
    step below is one atomic operation of a dict or a set.

    ``_lock`` guards the opening only: each channel opens at most once, and none is open after
    ``close``. It is reentrant, for a signal handler may close the client that is being opened.

    ``_sleepers``: the queues that wake a thread which waits before its next try.
    """

    def __init__(self, settings: Settings) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._balancer = new_balancer(settings)
        self._control: grpc.Channel | BalancedChannel | None = None
        self._pairs: list[_Pair] = []
        self._process = 0
        self._lock = threading.RLock()
        self._in_flight: dict[str, Call[Any] | GenerationSession] = {}
        self._cancels: set[threading.Thread] = set()
        self._sleepers: set[SimpleQueue[Any]] = set()
        self._uploaded: set[str] = set()
        self._uploading = threading.RLock()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open at the first use.

        Raises ``RuntimeError`` in a process that was forked after that.
        """
        self._check_process()
        return self._pairs[0].stubs if self._pairs else self._open().stubs

    @property
    def forked(self) -> bool:
        """Whether the channels belong to the parent of this process."""
        return bool(self._pairs) and self._process != os.getpid()

    @property
    def connected(self) -> bool:
        """Whether there is a connection to a server now."""
        return any(map(is_connected, self._all_channels()))

    def _check_process(self) -> None:
        if self.forked:
            raise RuntimeError(
                "this client was in use before the process forked: make one in each process"
            )

    def _open(self) -> _Pair:
        """A pair of channels with room for a call."""
        with self._lock:
            free = next((pair for pair in self._pairs if len(pair.calls) < CALLS_PER_PAIR), None)
            if free is None:
                if self._control is None:
                    self._process = os.getpid()
                    self._control = open_control_channel(self._settings, self._balancer)
                channels = open_pair(self._settings, self._balancer)
                free = _Pair(channels, Stubs(*channels, self._control))
                self._pairs.append(free)
                if self.closed:  # Before this, or meanwhile by a signal handler.
                    self._close_channels()
            return free

    def run(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        in_flight = self.start(call)
        try:
            return in_flight.result()
        finally:
            in_flight.cancel()

    def start(self, call: Call[A]) -> "InFlightCall[A]":
        """Make ``call`` without waiting for its answer."""
        self.check_open()
        self._check_process()
        self.register(call)  # Before the call: an interrupt may come at any moment after it.
        return InFlightCall(self, call)

    def open(self, call: NextCall, metadata: Metadata, request_id: str | None) -> Any:
        """Make one unary call; returns gRPC's future."""
        if self.closed:
            raise client_closed_error(request_id)
        if call.uploads:
            self._send(call, metadata)
        return self._start(call, metadata, request_id, stream=False)

    def open_stream(self, session: GenerationSession, call: NextCall) -> Any:
        """Open the stream of ``call``; returns gRPC's call."""
        if self.closed:
            raise client_closed_error(session.request_id)
        self._check_process()
        self.register(session)
        if call.uploads:
            self._send(call, session.metadata)
        return self._start(call, session.metadata, session.request_id, stream=True)

    def _send(self, call: NextCall, metadata: Metadata) -> None:
        """Send the files of ``call`` that this client has not sent before, one at a time."""
        for upload in call.uploads:
            with self._uploading:
                if upload.again or upload.upload_id not in self._uploaded:
                    self.run(upload_call(upload, call, self._settings, metadata))
                    self._uploaded.add(upload.upload_id)

    def _start(
        self, call: NextCall, metadata: Metadata, request_id: str | None, *, stream: bool
    ) -> Any:
        place = object()
        if call.control:
            stubs, calls = self.stubs, set[object]()
        else:
            self._check_process()
            with self._lock:  # Two threads must not both take the last place.
                pair = self._open()
                stubs, calls = pair.stubs, pair.calls
                calls.add(place)
        method = call.method(stubs)
        start = method if stream else method.future
        try:
            started = start(call.message, timeout=call.timeout, metadata=metadata)
        except BaseException as error:
            calls.discard(place)
            if isinstance(error, ValueError) and self.closed:
                raise client_closed_error(request_id) from None
            raise
        started.add_done_callback(lambda _: calls.discard(place))
        return started

    def find_tls_problem(self, error: grpc.RpcError, seconds: float) -> str:
        """Why TLS is the cause of ``error``; empty if it is not."""
        return "" if was_sent(error) else find_tls_problem(self._settings, seconds)

    def sleep(self, seconds: float, wake: SimpleQueue[Any]) -> None:
        """Wait until ``seconds`` have passed, ``wake`` gets an item, or the client is closed."""
        with self.waking(wake), suppress(Empty):
            wake.get(timeout=seconds)

    @contextmanager
    def waking(self, wake: SimpleQueue[Any]) -> Iterator[None]:
        """``close`` puts None into ``wake`` until the end of the block."""
        # A SimpleQueue: unlike an Event it may be set by a signal handler in the waiting thread.
        self._sleepers.add(wake)
        try:
            if self.closed:
                wake.put(None)
            yield
        finally:
            self._sleepers.discard(wake)

    def register(self, job: Call[Any] | GenerationSession) -> None:
        """Note that a job is in flight, if the server continues it after a lost connection."""
        if job.survives_disconnect and job.request_id is not None:
            self._in_flight[job.request_id] = job

    def finish(self, request_id: str | None, *, needs_cancel: bool) -> None:
        """Note that no caller waits for this job any more; cancel it if it needs that."""
        if request_id is None or (job := self._in_flight.get(request_id)) is None:
            return
        if needs_cancel:
            self._start_cancel(job)
        self._in_flight.pop(request_id, None)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    def close(self) -> None:
        """Cancel every job in flight, wait until that is done, and close the channels."""
        self.closed = True
        if self.forked:
            return
        for wake in self._sleepers.copy():
            wake.put(None)
        for request_id in self._in_flight.copy():
            self.finish(request_id, needs_cancel=True)
        for thread in self._cancels.copy():
            # One that has not started yet belongs to a job that was just cancelled above.
            if thread.is_alive():
                thread.join()
        with self._lock:  # Wait for a thread that opens them now.
            self._close_channels()

    def _close_channels(self) -> None:
        for channel in self._all_channels():
            channel.close()

    def _all_channels(self) -> list[grpc.Channel | BalancedChannel]:
        control = [] if self._control is None else [self._control]
        return control + [channel for pair in self._pairs for channel in pair.channels]

    def _start_cancel(self, job: Call[Any] | GenerationSession) -> None:
        if not self._pairs or self.forked or sys.is_finalizing():
            # No call was made; or the parent made it; or no thread can start any more, and the
            # job ends after the server's grace time.
            return
        # A thread: the caller does not wait for the cancel. And a finalizer must not make a call
        # itself: it may have interrupted gRPC while gRPC holds a lock.
        thread = threading.Thread(target=self._cancel, args=(job,))
        self._cancels.add(thread)
        thread.start()

    def _cancel(self, job: Call[Any] | GenerationSession) -> None:
        """Make one cancel call, to the server that has the job if its address is known."""
        ends_at = time.monotonic() + CANCEL_ON_EXIT_SECONDS
        message = generation_pb2.CancelGenerationRequest(request_id=job.request_id or "")

        def call(stub: Any) -> None:
            timeout = ends_at - time.monotonic()
            # Whatever the answer is, there is no second call: a job that this one did not reach
            # ends after its server's grace time.
            stub.CancelGeneration.future(message, timeout=timeout, metadata=job.metadata).code()

        try:
            address = server_address(
                job.server_id, self._settings.target, CANCEL_ON_EXIT_SECONDS / 2
            )
            if address is None:
                call(self.stubs.control)
            else:
                with open_direct_channel(self._settings, address) as channel:
                    call(generation_pb2_grpc.GenerationServiceStub(channel))
        except ValueError:
            # ``close`` ran between ``add`` and ``start`` above, and has cancelled the job.
            if not self.closed:
                raise
        finally:
            self._cancels.discard(threading.current_thread())


class InFlightCall(Generic[A]):
    """A unary call in flight: one try after the other.

    One thread moves it from try to try: the one in ``result``, or the batch that uses
    ``when_try_ended``, ``end_of_try`` and ``retry``. ``cancel`` may interrupt that thread.
    """

    def __init__(self, transport: SyncTransport, call: Call[A]) -> None:
        self._transport = transport
        self._call = call
        self._tries = CallTries(call)
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._response: Any = None
        self._future: Any = None
        self._cancelled = False
        # The client was closed before a try.
        self._closed: DarkroomError | None = None
        self.retry()

    def result(self) -> A:
        """Wait for the answer; raises the call's ``DarkroomError``."""
        while (pause := self.end_of_try()) is not None:
            self._transport.sleep(pause, self._wake)
            self.retry()
        return self.answer()

    def retry(self) -> None:
        """Begin the next try; ``end_of_try`` raises the error if there is none."""
        try:
            self._future = self._transport.open(
                self._tries.next_call(), self._call.metadata, self._call.request_id
            )
        except DarkroomError as closed:
            self._closed = closed
        else:
            if self._cancelled:  # While the try was being opened: cancel that one too.
                self._transport.register(self._call)
                self.cancel()

    def when_try_ended(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` in some thread once the current try has ended."""
        if self._closed is not None:
            notify()
            return
        self._future.add_done_callback(lambda _: notify())

    def end_of_try(self) -> float | None:
        """Wait for the end of the try; returns the seconds until the next, None for an answer.

        Raises the call's ``DarkroomError`` if there is no next try.
        """
        if self._closed is not None:
            raise self._closed
        try:
            self._response = self._future.result()
        except grpc.FutureCancelledError:
            raise client_closed_error(self._call.request_id) from None
        except grpc.RpcError as error:
            if self._transport.closed:
                raise client_closed_error(self._call.request_id) from error
            return self._after(error)
        self._finish(needs_cancel=False)
        return None

    def answer(self) -> A:
        """The answer, after ``end_of_try`` returned None."""
        return self._call.decode(self._response)

    def cancel(self) -> None:
        """Cancel the call and its job, unless the answer is there."""
        self._cancelled = True
        future = self._future
        if future is None:
            return
        answered = future.done() and not future.cancelled() and future.exception() is None
        self._finish(needs_cancel=not answered)
        if not self._transport.forked:
            future.cancel()

    def _after(self, error: grpc.RpcError) -> float:
        transport, late = self._transport, error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        try:
            return self._tries.on_failed(
                error,
                connected=not late or transport.connected,
                tls_problem=transport.find_tls_problem(error, self._tries.remaining),
            )
        except DarkroomError as failure:
            self._finish(needs_cancel=self._tries.needs_cancel(error))
            raise failure from error

    def _finish(self, *, needs_cancel: bool) -> None:
        self._transport.finish(self._call.request_id, needs_cancel=needs_cancel)
