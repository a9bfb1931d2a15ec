"""Channels to several servers as one: each call goes to the server that a balancer chooses."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc
import grpc.aio

from darkroom_client._protocol.balancing import DETAILS_KEY, JOB_STARTS, Balancer, request_id_of
from darkroom_client._protocol.rpc_errors import found_server


class _Choice(NamedTuple):
    """A call of ``method`` that went to ``server``; ``request_id``: "" if it is about no job."""

    server: int
    method: str
    request_id: str


class _Method:
    """One method of a service, at every server; begins calls as gRPC's own methods do."""

    def __init__(
        self,
        path: str,
        methods: Sequence[Any],
        balancer: Balancer,
        on_ended: Callable[["_Choice", Any], None],
    ) -> None:
        self._name = path.rpartition("/")[2]
        self._methods = methods
        self._balancer = balancer
        self._on_ended = on_ended

    def __call__(self, message: Any, **options: Any) -> Any:
        return self._begin(lambda method: method, message, options)

    def future(self, message: Any, **options: Any) -> Any:
        """Begin a unary call of a blocking channel."""
        return self._begin(lambda method: method.future, message, options)

    def _begin(self, start: Callable[[Any], Any], message: Any, options: dict[str, Any]) -> Any:
        server = self._balancer.choose(self._name, message)
        # If this server is down, another one may be up: the next try finds it.
        options.pop("wait_for_ready", None)
        call = start(self._methods[server])(message, **options)
        choice = _Choice(server, self._name, request_id_of(message))
        call.add_done_callback(partial(self._on_ended, choice))
        return call


class _Balanced:
    """What stubs need of a channel; ``channels``: one for each server."""

    def __init__(self, channels: Sequence[Any], balancer: Balancer) -> None:
        self.channels = channels
        self._balancer = balancer

    def _ended(self, choice: _Choice, call: Any) -> None:
        raise NotImplementedError

    def _method(self, kind: str, path: str, *arguments: Any, **options: Any) -> _Method:
        methods = [getattr(each, kind)(path, *arguments, **options) for each in self.channels]
        return _Method(path, methods, self._balancer, self._ended)

    def unary_unary(self, path: str, *arguments: Any, **options: Any) -> _Method:
        """As of a channel."""
        return self._method("unary_unary", path, *arguments, **options)

    def unary_stream(self, path: str, *arguments: Any, **options: Any) -> _Method:
        """As of a channel."""
        return self._method("unary_stream", path, *arguments, **options)

    def stream_unary(self, path: str, *arguments: Any, **options: Any) -> _Method:
        """As of a channel."""
        return self._method("stream_unary", path, *arguments, **options)

    def _record(self, choice: _Choice, code: Any, details: Any, trailers: Any) -> None:
        server, method, request_id = choice
        trailers = trailers or ()
        if method in JOB_STARTS and any(key == DETAILS_KEY for key, _ in trailers):
            self._balancer.rejected(request_id)
        if code is grpc.StatusCode.UNAVAILABLE:
            found = found_server(details or "")
            self._balancer.unavailable(server, method, trailers, found=found)
        elif code is grpc.StatusCode.OK or trailers:  # Else this client ended the call itself.
            self._balancer.answered(server, trailers)


class BalancedChannel(_Balanced):
    """Of blocking channels."""

    def _ended(self, choice: _Choice, call: Any) -> None:
        # On gRPC's thread; the call has ended, so none of these waits.
        self._record(choice, call.code(), call.details(), call.trailing_metadata())

    def close(self) -> None:
        """Close every channel."""
        for channel in self.channels:
            channel.close()


class BalancedAsyncChannel(_Balanced):
    """Of asyncio channels."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], balancer: Balancer) -> None:
        super().__init__(channels, balancer)
        self._reading: set[asyncio.Task[None]] = set()

    def _ended(self, choice: _Choice, call: Any) -> None:
        reading = asyncio.ensure_future(self._read(choice, call))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)

    async def _read(self, choice: _Choice, call: Any) -> None:
        trailers = await call.trailing_metadata()
        self._record(choice, await call.code(), await call.details(), trailers)

    def get_state(self) -> grpc.ChannelConnectivity:
        """READY if a server is connected, else the first one's."""
        states = [channel.get_state() for channel in self.channels]
        ready = grpc.ChannelConnectivity.READY
        return ready if ready in states else states[0]

    async def close(self) -> None:
        """Close every channel."""
        if self._reading:
            await asyncio.wait(self._reading)
        for channel in self.channels:
            await channel.close()
