"""The events of a job, for the blocking client."""

import threading
from collections import deque
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import grpc

from darkroom_client._protocol.retries import client_closed_error
from darkroom_client._protocol.rpc_errors import was_sent
from darkroom_client._protocol.session import GenerationSession
from darkroom_client._transport.sync import STATUS_SECONDS, SyncTransport
from darkroom_client._types.events import Event
from darkroom_client._types.result import GenerationResult


class Stream:
    """The events of a job as they happen: a context manager and an iterator.

    The end of the ``with`` block closes it: a job that this stream started is cancelled on the
    server, a job that is only watched continues. After a lost connection the stream reconnects,
    within the timeout, and repeats no event except progress.
    """

    def __init__(self, transport: SyncTransport, session: GenerationSession) -> None:
        self._transport = transport
        self._session = session
        self._events: deque[Event] = deque()
        self._call: Any = None
        self._pause = 0.0
        self._entered = False
        self._closed = False
        self._wake: SimpleQueue[None] = SimpleQueue()

    @property
    def request_id(self) -> str:
        """The id of the job, for ``watch`` and ``cancel``."""
        return self._session.request_id

    def result(self) -> GenerationResult:
        """Wait for the end and return the images; unread events are discarded.

        Outside of a ``with`` block it is the block itself: the stream is closed afterwards.
        """
        if not self._entered:
            with self:
                return self.result()
        for _ in self:
            pass
        if self._session.result is None:
            raise RuntimeError("this stream has failed: it has no result")
        return self._session.result

    def close(self) -> None:
        """Close the stream. Idempotent, and safe from a thread other than the reader's."""
        if self._closed:
            return
        self._closed = True
        self._wake.put(None)
        self._cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if not self._entered:
            raise RuntimeError("a stream is a context: with client.stream(...) as stream:")
        while not self._events:
            if self._session.ended:
                raise StopIteration
            if self._closed:
                raise RuntimeError("this stream was closed before its end")
            self._read()
        return self._events.popleft()

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        """Read one message, after the pause before a call; or handle the end of a call."""
        error: grpc.RpcError | None = None
        if self._pause:
            pause, self._pause = self._pause, 0.0
            self._transport.sleep(pause, self._wake)
            return
        try:
            if self._call is None:
                call = self._session.next_call()
                self._call = self._transport.open_stream(self._session, call)
                if self._closed:
                    # ``close`` ran meanwhile, when there was no call to cancel yet.
                    self._transport.register(self._session)
                    self._cancel()
            response = next(self._call)
        except StopIteration:
            pass
        except grpc.RpcError as ended:
            error = ended
        else:
            self._events.extend(self._session.feed(response.event))
            if self._session.ended:
                self._wait_for_status()
            return
        self._call = None
        if not self._session.ended:
            self._end_call(error)

    def _end_call(self, error: grpc.RpcError | None) -> None:
        if error is None:
            pause = self._session.on_call_ended(None)
        else:
            if self._transport.closed or self._closed:
                self._session.ended = True
                raise client_closed_error(self.request_id) from error
            problem = self._transport.find_tls_problem(error, self._session.remaining)
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            pause = self._session.on_call_ended(
                self._session.failure(error, problem),
                sent=was_sent(error),
                connected=not late or self._transport.connected,
            )
        self._pause = pause.seconds
        if pause.event is not None:
            self._events.append(pause.event)

    def _wait_for_status(self) -> None:
        """Let the call end by itself: a cancel would make a finished job look cancelled."""
        ended = threading.Event()
        # A call that has ended adds no callback. Whatever the status is, the job has finished.
        if self._call.add_callback(ended.set):
            ended.wait(STATUS_SECONDS)

    def _cancel(self) -> None:
        """Cancel the job, if it is this stream's own, and the call."""
        self._transport.finish(self.request_id, needs_cancel=self._session.needs_cancel)
        if self._call is not None and not self._transport.forked:
            self._call.cancel()
