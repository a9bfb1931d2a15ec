"""The blocking client's I/O: one channel, and who waits for what over it."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from darkroom_client._call import Call, closed_under
from darkroom_client._calls import Calls
from darkroom_client._channel import open_channel
from darkroom_client._errors import DarkroomError
from darkroom_client._following import PLACES, Attempt, Following
from darkroom_client._settings import Metadata, Settings
from darkroom_client._stubs import Stubs

FAREWELL_SECONDS = 2.0
"""How long a server may take to hear that nobody waits for a job any more."""

A = TypeVar("A")


class Link:
    """Makes calls; safe to share between threads."""

    def __init__(self, settings: Settings, calls: Calls) -> None:
        self.closed = False
        self._calls = calls
        self._channel = open_channel(settings)
        self.stubs = Stubs(self._channel)
        # Jobs that the server would go on with if this side just went away.
        self._kept: dict[str, Metadata] = {}
        self._farewells: set[threading.Thread] = set()
        # Held while a job changes hands, so that either its caller or ``close`` says farewell, and
        # while that starts, for a thread that has not started cannot be joined.
        # May be taken twice: an iterator that is dropped leaves its jobs at any moment.
        self._leaving = threading.RLock()

    def ask(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        pending = self.start(call)
        try:
            return pending.result()
        finally:
            pending.cancel()

    def start(self, call: Call[A]) -> "Pending[A]":
        """Make ``call`` and wait for nothing."""
        self.check_open()
        # Before the call, for an interrupt may come at any moment after it.
        if call.keeps and call.request_id is not None:
            self._keep(call.request_id, call.metadata)
        try:
            future = call.method(self.stubs).future(
                call.message, timeout=call.timeout, metadata=call.metadata
            )
        except ValueError:
            if self.closed:
                raise closed_under(call.request_id) from None
            raise
        return Pending(self, call, future)

    def follow(self, following: Following, attempt: Attempt) -> Any:
        """Open the stream of ``attempt``."""
        if self.closed:
            raise closed_under(following.request_id)
        if following.leaves_work:
            self._keep(following.request_id, following.metadata)
        try:
            opened = attempt.method(self.stubs)(
                attempt.message, timeout=attempt.timeout, metadata=following.metadata
            )
        except ValueError:
            if self.closed:
                raise closed_under(following.request_id) from None
            raise
        # Again, for whoever left meanwhile said farewell to a job that was not there yet.
        if following.leaves_work:
            self._keep(following.request_id, following.metadata)
        return opened

    def settle(self, request_id: str | None, *, leaves_work: bool) -> None:
        """Nobody waits for this job any more; the server is told where it would not notice."""
        if request_id is None:
            return
        with self._leaving:
            # A client that closes says farewell to all that is left.
            metadata = None if self.closed else self._kept.pop(request_id, None)
            if metadata is not None and leaves_work:
                self._say_farewell(request_id, metadata)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    def close(self) -> None:
        """Tell the server which jobs nobody waits for any more, then close the channel."""
        with self._leaving:
            if not self.closed:
                self.closed = True
                for request_id, metadata in tuple(self._kept.items()):
                    self._say_farewell(request_id, metadata)
                self._kept.clear()
            farewells = tuple(self._farewells)
        for farewell in farewells:
            farewell.join()
        self._channel.close()

    def _keep(self, request_id: str, metadata: Metadata) -> None:
        with self._leaving:
            self._kept[request_id] = metadata

    def _say_farewell(self, request_id: str, metadata: Metadata) -> None:
        # A thread, for it may take several calls, and whoever leaves should not wait for them.
        farewell = threading.Thread(target=self._cancel_somewhere, args=(request_id, metadata))
        self._farewells.add(farewell)
        farewell.start()

    def _cancel_somewhere(self, request_id: str, metadata: Metadata) -> None:
        """Cancel a job at whichever of the servers behind the target has it."""
        call = self._calls.farewell(request_id, FAREWELL_SECONDS, metadata)
        try:
            # All at once the second time: a balanced connection takes calls in a row to one server
            # after the other, unless somebody else's come between.
            for count in (1, PLACES):
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


class Pending(Generic[A]):
    """A call that runs."""

    def __init__(self, link: Link, call: Call[A], future: Any) -> None:
        self._link = link
        self._call = call
        self._future = future

    def result(self) -> A:
        """The answer, waited for; raises the call's ``DarkroomError``."""
        try:
            response = self._future.result()
        except grpc.FutureCancelledError:
            raise closed_under(self._call.request_id) from None
        except grpc.RpcError as error:
            failure = self._call.failure(error)
            self._settle(leaves_work=self._call.leaves_work(failure))
            raise failure from error
        self._settle(leaves_work=False)
        return self._call.decode(response)

    def outcome(self) -> A | DarkroomError:
        """The answer, or what came in its place."""
        try:
            return self.result()
        except DarkroomError as error:
            return error

    def when_done(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called, in some thread, once the answer is there."""
        self._future.add_done_callback(lambda _: tell())

    def cancel(self) -> None:
        """Leave, where there is no answer yet; the server stops drawing."""
        self._settle(leaves_work=not self._future.done())
        self._future.cancel()

    def _settle(self, *, leaves_work: bool) -> None:
        self._link.settle(self._call.request_id, leaves_work=leaves_work)
