"""(c) Ray Serve with ``@serve.batch``: one queue for each combination of settings, one replica.

The model is called on the event loop: with ``to_thread`` batches would hold one request, and
several threads would call torch.
"""

import signal
from collections.abc import Awaitable, Callable, Hashable

import ray
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bench.peers.servers.config import READY, ServerConfig, from_wire
from bench.peers.servers.sd_pipeline import SdPipeline
from bench.workload.requests import Request

ONGOING = 1024
"""Requests that may wait in the replica; Ray's default of 5 would limit the batches."""


@serve.deployment(max_ongoing_requests=ONGOING)
class Peer:
    """Holds the model, and batches requests of equal settings."""

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]
        # A coroutine loads the model on the thread of the event loop, which later generates.
        self._config = config
        self._pipeline = SdPipeline(config)
        self._queues: dict[Hashable, Callable[[Request], Awaitable[bytes]]] = {}

    async def __call__(self, http: HttpRequest) -> Response:
        """Generate the image of one request."""
        request = from_wire(await http.json())
        if request.settings not in self._queues:
            self._queues[request.settings] = self._queue()
        return Response(await self._queues[request.settings](request), media_type="image/png")

    def _queue(self) -> Callable[[Request], Awaitable[bytes]]:
        pipeline = self._pipeline

        @serve.batch(
            max_batch_size=self._config.max_batch_images,
            batch_wait_timeout_s=self._config.batch_timeout,
        )
        async def generate(requests: list[Request]) -> list[bytes]:
            return pipeline.generate(requests)

        queue: Callable[[Request], Awaitable[bytes]] = generate
        return queue


def main() -> None:
    """Serve until killed."""
    config = ServerConfig.of_command_line(__doc__)
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": config.port})
    serve.run(Peer.bind(config))  # type: ignore[attr-defined]
    print(READY, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
