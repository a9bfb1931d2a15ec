"""(c) Ray Serve with ``@serve.batch``: a queue for each of the settings, one replica.

The model is called inline: through ``to_thread`` the loop would hand out batches of one, and
several threads would call torch.
"""

import signal
from collections.abc import Awaitable, Callable, Hashable

import ray
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bench.peers.drawer import Drawer
from bench.peers.serving import READY, Serving, from_wire
from bench.workload import Request

ONGOING = 1024
"""Requests that may wait in the replica; Ray's own default of 5 would cap the batches."""


@serve.deployment(max_ongoing_requests=ONGOING)
class Peer:
    """Holds the model, and batches what has equal settings."""

    async def __init__(self, serving: Serving) -> None:  # type: ignore[misc]
        # A coroutine, so that the model is loaded on the loop's thread, which is to draw.
        self._serving = serving
        self._drawer = Drawer(serving)
        self._queues: dict[Hashable, Callable[[Request], Awaitable[bytes]]] = {}

    async def __call__(self, http: HttpRequest) -> Response:
        """Draw the image of one request."""
        request = from_wire(await http.json())
        if request.settings not in self._queues:
            self._queues[request.settings] = self._queue()
        return Response(await self._queues[request.settings](request), media_type="image/png")

    def _queue(self) -> Callable[[Request], Awaitable[bytes]]:
        drawer = self._drawer

        @serve.batch(max_batch_size=self._serving.widest, batch_wait_timeout_s=self._serving.window)
        async def draw(requests: list[Request]) -> list[bytes]:
            return drawer.draw(requests)

        queue: Callable[[Request], Awaitable[bytes]] = draw
        return queue


def main() -> None:
    """Serve until killed."""
    serving = Serving.of_command_line(__doc__)
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": serving.port})
    serve.run(Peer.bind(serving))  # type: ignore[attr-defined]
    print(READY, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
