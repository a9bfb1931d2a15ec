"""The blocking client's I/O: its channels, and who waits for what over them."""

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.call import Call, closed_under
from darkroom_client._protocol.calls import Calls
from darkroom_client._protocol.session import MAX_BACKENDS_PROBED, GenerationSession, NextCall
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata, Settings
from darkroom_client._transport.channels import check_files, open_channels

CANCEL_ON_EXIT_SECONDS = 2.0
"""How long a server may take to hear that nobody waits for a job any more."""

A = TypeVar("A")


class SyncTransport:
    """Makes calls; safe to share between threads, and of the process of its first call.

    gRPC's threads do not survive a fork: over channels that were opened before it, calls may hang.
    """

    def __init__(self, settings: Settings, calls: Calls) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._calls = calls
        self._channels: tuple[grpc.Channel, ...] = ()
        self._stubs: Stubs | None = None
        self._process = 0
        # May be taken twice: a signal's handler may close the client that is being opened.
        self._opening = threading.RLock()
        # Jobs that the server would go on with if this side just went away.
        self._kept: dict[str, Metadata] = {}
        self._farewells: set[threading.Thread] = set()
        # Held while a job changes hands, so that either its caller or ``close`` cancels it,
        # and while that starts, for a thread that has not started cannot be joined.
        # May be taken twice: an iterator that is dropped leaves its jobs at any moment.
        self._leaving = threading.RLock()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open here, at the first use.

        Raises ``RuntimeError`` in a process that was forked since.
        """
        self._check_process()
        return self._stubs or self._open()

    @property
    def _forked(self) -> bool:
        return self._stubs is not None and self._process != os.getpid()

    def _check_process(self) -> None:
        if self._forked:
            raise RuntimeError(
                "this client was in use before the process forked: make one in each process"
            )

    def _open(self) -> Stubs:
        with self._opening:
            if self._stubs is None:
                if self.closed:
                    raise ValueError("closed before its first call")  # As gRPC's own channels do.
                self._process = os.getpid()
                self._channels = open_channels(self._settings)
                self._stubs = Stubs(*self._channels)
            return self._stubs

    def ask(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        pending = self.start(call)
        try:
            return pending.result()
        finally:
            pending.cancel()

    def start(self, call: Call[A]) -> "InFlightCall[A]":
        """Make ``call`` and wait for nothing."""
        self.check_open()
        self._check_process()
        # Before the call, for an interrupt may come at any moment after it.
        if call.survives_disconnect and call.request_id is not None:
            self._keep(call.request_id, call.metadata)
        return InFlightCall(self, call)

    def open(self, call: Call[A]) -> Any:
        """Make one try of ``call``: a future of gRPC's."""
        try:
            return call.method(self.stubs).future(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
        except ValueError:
            if self.closed:
                raise closed_under(call.request_id) from None
            raise

    def follow(self, session: GenerationSession, attempt: NextCall) -> Any:
        """Open the stream of ``attempt``."""
        if self.closed:
            raise closed_under(session.request_id)
        self._check_process()
        if session.needs_cancel:
            self._keep(session.request_id, session.metadata)
        try:
            opened = attempt.method(self.stubs)(
                attempt.message, timeout=attempt.timeout, metadata=session.metadata
            )
        except ValueError:
            if self.closed:
                raise closed_under(session.request_id) from None
            raise
        # Again, for whoever left meanwhile cancelled a job that was not there yet.
        if session.needs_cancel:
            self._keep(session.request_id, session.metadata)
        return opened

    def settle(self, request_id: str | None, *, needs_cancel: bool) -> None:
        """Nobody waits for this job any more; the server is told where it would not notice."""
        if request_id is None:
            return
        with self._leaving:
            # A client that closes cancels all that remain.
            metadata = None if self.closed else self._kept.pop(request_id, None)
            if metadata is not None and needs_cancel:
                self._cancel_on_exit(request_id, metadata)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    def close(self) -> None:
        """Tell the server which jobs nobody waits for any more, then close the channels."""
        with self._leaving:
            if not self.closed:
                self.closed = True
                for request_id, metadata in tuple(self._kept.items()):
                    self._cancel_on_exit(request_id, metadata)
                self._kept.clear()
            farewells = tuple(self._farewells)
        for cancel_on_exit in farewells:
            cancel_on_exit.join()
        with self._opening:  # Once it is free, nobody opens any more.
            channels = () if self._forked else self._channels  # The parent closes its own.
        for channel in channels:
            channel.close()

    def _keep(self, request_id: str, metadata: Metadata) -> None:
        with self._leaving:
            self._kept[request_id] = metadata

    def _cancel_on_exit(self, request_id: str, metadata: Metadata) -> None:
        if self._stubs is None or self._forked:
            return  # Nothing was ever asked, or by the parent, whose jobs go on.
        # A thread, for it may take several calls, and whoever leaves should not wait for them.
        cancel_on_exit = threading.Thread(
            target=self._cancel_somewhere, args=(request_id, metadata)
        )
        self._farewells.add(cancel_on_exit)
        cancel_on_exit.start()

    def _cancel_somewhere(self, request_id: str, metadata: Metadata) -> None:
        """Cancel a job at whichever of the servers behind the target has it."""
        call = self._calls.cancel_on_exit(request_id, CANCEL_ON_EXIT_SECONDS, metadata)
        try:
            # All at once the second time: a balanced connection takes calls in a row to one server
            # after the other, unless somebody else's come between.
            for count in (1, MAX_BACKENDS_PROBED):
                running = [
                    call.method(self.stubs).future(
                        call.message, timeout=call.timeout, metadata=call.metadata
                    )
                    for _ in range(count)
                ]
                # Any other answer is the end: it is cancelled, or the server is gone, and the job.
                if {each.code() for each in running} != {grpc.StatusCode.NOT_FOUND}:
                    return
        finally:
            self._farewells.discard(threading.current_thread())


class InFlightCall(Generic[A]):
    """A call that runs, in one try or two."""

    def __init__(self, link: SyncTransport, call: Call[A]) -> None:
        self._transport = link
        self._call = call
        self._ends_at = call.ends_at()
        self._left = False
        # Held while one try follows another. May be taken twice, as the link's own.
        self._turning = threading.RLock()
        self._try = call
        self._future = link.open(call)

    def result(self) -> A:
        """The answer, waited for; raises the call's ``DarkroomError``."""
        while True:
            future = self._future
            try:
                response = future.result()
                break
            except grpc.FutureCancelledError:
                raise closed_under(self._call.request_id) from None
            except grpc.RpcError as error:
                if self._goes_on(future):
                    continue
                failure = self._call.failure(error)
                self._settle(needs_cancel=self._call.needs_cancel(failure))
                raise failure from error
        self._settle(needs_cancel=False)
        return self._call.decode(response)

    def outcome(self) -> A | DarkroomError:
        """The answer, or what came in its place."""
        try:
            return self.result()
        except DarkroomError as error:
            return error

    def when_done(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called, in some thread, once the answer is there."""

        def done(future: Any) -> None:
            goes_on = False
            try:
                goes_on = self._goes_on(future)
            finally:
                # Were it not told, for whatever reason, its reader would wait for ever.
                if not goes_on:
                    tell()
            if goes_on:
                self._future.add_done_callback(done)

        self._future.add_done_callback(done)

    def cancel(self) -> None:
        """Leave, where there is no answer yet; the server stops drawing."""
        with self._turning:
            needs_cancel = not self._future.done() or self._again() is not None
            self._left = True
        self._settle(needs_cancel=needs_cancel)
        self._future.cancel()

    def _goes_on(self, future: Any) -> bool:
        """Whether there is another try after ``future``, which has ended; begins it."""
        with self._turning:
            if self._future is future:
                again = self._again()
                if again is None:
                    return False
                self._try, self._future = again, self._transport.open(again)
                if self._left:
                    # By an iterator that was dropped in this very moment.
                    self._future.cancel()
            return True

    def _again(self) -> Call[A] | None:
        """The try to make after the one that ended; None where that was the last."""
        if self._left or self._transport.closed or self._future.cancelled():
            return None
        error = self._future.exception()
        return None if error is None else self._try.again(error, self._ends_at)

    def _settle(self, *, needs_cancel: bool) -> None:
        self._transport.settle(self._call.request_id, needs_cancel=needs_cancel)
