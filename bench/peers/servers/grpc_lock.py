"""(a) The usual gRPC service: a pool of threads, and one caller of ``pipe()`` at a time.

The lock is a queue for one thread, so that it is always the same one that calls torch. A caller
that left while it waited is not drawn.
"""

from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.peers.drawer import Drawer
from bench.peers.serving import READY, Serving
from bench.workload import Request
from darkroom.v1 import generation_pb2, generation_pb2_grpc

CALLS = 256
"""More than ever wait at once: a call that waits for a thread could not be cancelled."""


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Draws one image after another."""

    def __init__(self, serving: Serving) -> None:
        self._model = ThreadPoolExecutor(1)
        self._drawer = self._model.submit(Drawer, serving).result()

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        """Draw the image of one request."""
        wanted = Request(
            index=int(request.request_id.rpartition("-")[2]),
            prompt=request.prompt,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            width=request.width if request.HasField("width") else None,
            height=request.height if request.HasField("height") else None,
        )
        data = self._model.submit(self._draw, wanted, context).result()
        if data is None:
            context.abort(grpc.StatusCode.CANCELLED, "the caller left")
        return generation_pb2.GenerateResponse(images=[generation_pb2.Image(data=data)])

    def _draw(self, wanted: Request, context: grpc.ServicerContext) -> bytes | None:
        return self._drawer.draw([wanted])[0] if context.is_active() else None


def main() -> None:
    """Serve until killed."""
    serving = Serving.of_command_line(__doc__)
    server = grpc.server(ThreadPoolExecutor(CALLS))
    service = Service(serving)  # type: ignore[abstract]  # It serves one method only.
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    server.add_insecure_port(f"127.0.0.1:{serving.port}")
    server.start()
    print(READY, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
