"""(c) Ray Serve with ``@serve.multiplexed`` and ``@serve.batch``, one replica.

It is written as its documentation says: a request gets its model first, and is then batched. The
model is called on the event loop, and loaded on another thread. There is one queue for each model
and combination of settings: in a queue for all, Ray would split each batch by model.

Ray unloads the model that was used longest ago, even while requests wait for its batch. They are
served by that model nevertheless, for which a real device might have no room: in Ray's favour.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bench.peers.servers.config import READY
from bench.trace.peers.config import ImageRequest, PeerConfig, from_wire
from bench.trace.peers.loads import CostedLoads
from bench.trace.peers.model import PeerModel, warm_up

ONGOING = 100_000
"""Requests that may wait in the replica; Ray's default of 5 would limit the batches."""

Waiting = tuple[PeerModel, ImageRequest]


def deployment_of(config: PeerConfig) -> Any:
    """The deployment; its class is made here because a decorator needs the number of models."""

    @serve.deployment(max_ongoing_requests=ONGOING)
    class Multiplexed:
        """Holds some models, and batches requests of one model and of equal settings."""

        async def __init__(self) -> None:  # type: ignore[misc]
            # A coroutine runs on the thread of the event loop, which later generates.
            warm_up(config)
            self._loads = CostedLoads(config, lambda name: PeerModel(name, config))
            self._loader = ThreadPoolExecutor(1)
            self._loaded_at: dict[str, float] = {}
            self._queues: dict[Hashable, Callable[[Waiting], Awaitable[bytes]]] = {}

        @serve.multiplexed(max_num_models_per_replica=config.device_models)
        async def get_model(self, name: str) -> PeerModel:
            """Load a model; Ray calls it for one at a time."""
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._loader, self._load, name)

        async def __call__(self, http: HttpRequest) -> Response:
            """Generate one image."""
            arrived = time.monotonic()
            request = from_wire(await http.json())
            name = serve.get_multiplexed_model_id()
            model = await self.get_model(name)
            self._loads.waited(self._loaded_at[name] - arrived)
            key = name, request.settings
            if key not in self._queues:
                self._queues[key] = self._queue()
            return Response(await self._queues[key]((model, request)), media_type="image/png")

        def _load(self, name: str) -> PeerModel:
            model = self._loads.load(name)
            self._loaded_at[name] = time.monotonic()
            return model

        def _queue(self) -> Callable[[Waiting], Awaitable[bytes]]:
            @serve.batch(
                max_batch_size=config.max_batch_images, batch_wait_timeout_s=config.batch_timeout
            )
            async def generate(waiting: list[Waiting]) -> list[bytes]:
                model, _ = waiting[-1]
                return model.generate([request for _, request in waiting])

            queue: Callable[[Waiting], Awaitable[bytes]] = generate
            return queue

    return Multiplexed


def main() -> None:
    """Serve until killed."""
    config = PeerConfig.of_command_line(__doc__)
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": config.port})
    serve.run(deployment_of(config).bind())
    print(READY, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
