"""The blocking client's I/O: its channels, its calls and their cancellation."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.call import Call, client_closed_error
from darkroom_client._protocol.session import GenerationSession, NextCall
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Settings
from darkroom_client._transport.channels import check_files, open_channels, open_direct_channel
from darkroom_client._transport.server_address import server_address

CANCEL_ON_EXIT_SECONDS = 2.0
"""The time limit of a cancel call, the lookup of the server's address included."""

STATUS_SECONDS = 5.0
"""How long a finished stream waits for the status of its call; then it cancels the call."""

A = TypeVar("A")


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

    ``_lock`` guards the opening only: the channels open at most once, and none is open after
    ``close``. It is reentrant, for a signal handler may close the client that is being opened.
    """

    def __init__(self, settings: Settings) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._channels: tuple[grpc.Channel, ...] = ()
        self._stubs: Stubs | None = None
        self._process = 0
        self._lock = threading.RLock()
        self._in_flight: dict[str, Call[Any] | GenerationSession] = {}
        self._cancels: set[threading.Thread] = set()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open at the first use.

        Raises ``RuntimeError`` in a process that was forked after that.
        """
        self._check_process()
        return self._stubs or self._open()

    @property
    def forked(self) -> bool:
        """Whether the channels belong to the parent of this process."""
        return self._stubs is not None and self._process != os.getpid()

    def _check_process(self) -> None:
        if self.forked:
            raise RuntimeError(
                "this client was in use before the process forked: make one in each process"
            )

    def _open(self) -> Stubs:
        with self._lock:
            if self._stubs is None:
                self._process = os.getpid()
                self._channels = open_channels(self._settings)
                self._stubs = Stubs(*self._channels)
                if self.closed:  # Before this, or meanwhile by a signal handler.
                    self._close_channels()
            return self._stubs

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

    def open(self, call: Call[A]) -> Any:
        """Make one try of ``call``; returns gRPC's future."""
        try:
            return call.method(self.stubs).future(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
        except ValueError:
            if self.closed:
                raise client_closed_error(call.request_id) from None
            raise

    def open_stream(self, session: GenerationSession, call: NextCall) -> Any:
        """Open the stream of ``call``; returns gRPC's call."""
        if self.closed:
            raise client_closed_error(session.request_id)
        self._check_process()
        self.register(session)
        try:
            return call.method(self.stubs)(
                call.message, timeout=call.timeout, metadata=session.metadata
            )
        except ValueError:
            if self.closed:
                raise client_closed_error(session.request_id) from None
            raise

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
        for request_id in self._in_flight.copy():
            self.finish(request_id, needs_cancel=True)
        for thread in self._cancels.copy():
            # One that has not started yet belongs to a job that was just cancelled above.
            if thread.is_alive():
                thread.join()
        with self._lock:  # Wait for a thread that opens them now.
            self._close_channels()

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()

    def _start_cancel(self, job: Call[Any] | GenerationSession) -> None:
        if self._stubs is None or self.forked or sys.is_finalizing():
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
                call(self.stubs.generation)
            else:
                with open_direct_channel(self._settings, address) as channel:
                    call(generation_pb2_grpc.GenerationServiceStub(channel))
        except ValueError:
            # ``close`` ran between ``add`` and ``start`` above, and has cancelled the job.
            if not self.closed:
                raise
        finally:
            self._cancels.discard(threading.current_thread())


class _Try(NamedTuple):
    call: Call[Any]
    future: Any


class InFlightCall(Generic[A]):
    """A unary call in flight: one try, or two.

    One thread at a time moves it from the first try to the second: gRPC's thread if ``when_done``
    is used, else the thread in ``result``. Any thread may cancel it at any moment, a signal handler
    and a finalizer included, and no lock is needed: ``cancel`` sets ``_cancelled`` and then reads
    ``_current``, the mover sets ``_current`` and then reads ``_cancelled``. So at least one of the
    two sees the other's write, and cancels the second try.
    """

    def __init__(self, transport: SyncTransport, call: Call[A]) -> None:
        self._transport = transport
        self._call = call
        self._ends_at = call.ends_at()
        self._cancelled = False
        self._current = _Try(call, transport.open(call))

    def result(self) -> A:
        """Wait for the answer; raises the call's ``DarkroomError``."""
        while True:
            current = self._current
            try:
                response = current.future.result()
                break
            except grpc.FutureCancelledError:
                raise client_closed_error(self._call.request_id) from None
            except grpc.RpcError as error:
                if self._retry(current):
                    continue
                failure = self._call.failure(error)
                self._finish(needs_cancel=self._call.needs_cancel(failure))
                raise failure from error
        self._finish(needs_cancel=False)
        return self._call.decode(response)

    def outcome(self) -> A | DarkroomError:
        """The answer, or the error in its place."""
        try:
            return self.result()
        except DarkroomError as error:
            return error

    def when_done(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` in some thread once the answer is there. Call this at most once."""

        def done(_: Any) -> None:
            retried = False
            try:
                retried = self._retry(self._current)
            finally:
                # Also after an error here, or the reader would wait forever.
                if not retried:
                    notify()
            if retried:
                self._current.future.add_done_callback(done)

        self._current.future.add_done_callback(done)

    def cancel(self) -> None:
        """Cancel the call and its job, unless the answer is there."""
        current = self._current
        needs_cancel = not current.future.done() or self._retry_call(current) is not None
        self._cancelled = True
        self._finish(needs_cancel=needs_cancel)
        if not self._transport.forked:
            self._current.future.cancel()

    def _retry(self, ended: _Try) -> bool:
        """Begin the try that follows ``ended``; false if there is none."""
        call = self._retry_call(ended)
        if call is None:
            return False
        self._current = _Try(call, self._transport.open(call))
        if self._cancelled:  # While the second try was being opened: cancel that one too.
            self._transport.register(call)
            self.cancel()
        return True

    def _retry_call(self, ended: _Try) -> Call[A] | None:
        """The call to make after the try that ended; None if that was the last."""
        if self._cancelled or self._transport.closed or ended.future.cancelled():
            return None
        error = ended.future.exception()
        return None if error is None else ended.call.retry_call(error, self._ends_at)

    def _finish(self, *, needs_cancel: bool) -> None:
        self._transport.finish(self._call.request_id, needs_cancel=needs_cancel)
