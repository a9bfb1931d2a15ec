"""Clients of the peers, which say for each request which model it is for."""

from collections.abc import Callable, Sequence
from typing import Protocol

from bench.peers.protocols import HttpPeerClient, TritonPeerClient, Wire, infer_body
from bench.trace.peers.config import ImageRequest
from bench.trace.peers.on_demand import OnDemand

HEADER = "serve_multiplexed_model_id"
"""Ray Serve's header with the model of a request."""


class TraceClient(Protocol):
    """A client of one peer, on one event loop.

    ``longest_wait``: of a request for its model in seconds, 0 if only the server knows.
    """

    @property
    def longest_wait(self) -> float:
        """See the class."""

    async def images(self, requests: Sequence[ImageRequest]) -> list[bytes]:
        """The PNG files of one caller's ``requests``; raises ``Ended`` if one does not come."""

    async def close(self) -> None:
        """Close the connections."""


class RayClient(HttpPeerClient):
    """Ray Serve loads a model when a request for it comes."""

    longest_wait = 0.0

    def __init__(self, port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}/")

    async def images(self, requests: Sequence[ImageRequest]) -> list[bytes]:
        """See ``TraceClient``: as many requests at once."""
        headers = {HEADER: requests[0].model}
        return await self.post_all([each.to_wire() for each in requests], headers)


class TritonClient(TritonPeerClient):
    """Orders Triton to load a model before its requests, and to unload another."""

    def __init__(self, port: int, device_models: int) -> None:
        super().__init__(port)
        self._server = f"http://127.0.0.1:{port}/v2"
        self._models = OnDemand(device_models, self._load, self._unload)

    @property
    def longest_wait(self) -> float:
        """See ``TraceClient``."""
        return self._models.longest_wait

    async def images(self, requests: Sequence[ImageRequest]) -> list[bytes]:
        """See ``TraceClient``: the rows of one request."""
        model = requests[0].model
        body = infer_body([each.to_wire() for each in requests])
        async with self._models.use(model):
            return self._files(await self.answer(f"{self._server}/models/{model}/infer", body))

    async def _load(self, model: str) -> None:
        await self.answer(f"{self._server}/repository/models/{model}/load", {})

    async def _unload(self, model: str) -> None:
        await self.answer(f"{self._server}/repository/models/{model}/unload", {})


CLIENTS: dict[Wire, Callable[[int, int], TraceClient]] = {
    Wire.RAY: lambda port, _: RayClient(port),
    Wire.TRITON: TritonClient,
}
"""By protocol, from the port and the number of models that the device holds."""
