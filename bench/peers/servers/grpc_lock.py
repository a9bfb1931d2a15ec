"""(a) The usual gRPC service: a pool of threads, and one call of ``pipe()`` at a time.

The lock is the queue of one thread, which is the only one that calls torch. A request that was
cancelled while it waited is skipped.
"""

from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.peers.servers.config import READY, ServerConfig
from bench.peers.servers.sd_pipeline import SdPipeline
from bench.workload.requests import Request
from darkroom.v1 import generation_pb2, generation_pb2_grpc

CALLS = 256
"""More than ever wait: a call without a thread could not be cancelled."""


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Serves one request after another."""

    def __init__(self, config: ServerConfig) -> None:
        self._model = ThreadPoolExecutor(1)
        self._pipeline = self._model.submit(SdPipeline, config).result()

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        """Generate the images of one request, in one call."""
        wanted = Request(
            index=int(request.request_id.rpartition("-")[2]),
            prompt=request.prompt,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            width=request.width if request.HasField("width") else None,
            height=request.height if request.HasField("height") else None,
            images=request.image_count,
        )
        files = self._model.submit(self._generate, wanted, context).result()
        if files is None:
            context.abort(grpc.StatusCode.CANCELLED, "cancelled by the caller")
        return generation_pb2.GenerateResponse(images=[generation_pb2.Image(data=f) for f in files])

    def _generate(self, wanted: Request, context: grpc.ServicerContext) -> list[bytes] | None:
        return self._pipeline.generate([wanted]) if context.is_active() else None


def main() -> None:
    """Serve until killed."""
    config = ServerConfig.of_command_line(__doc__)
    server = grpc.server(ThreadPoolExecutor(CALLS))
    service = Service(config)  # type: ignore[abstract]  # It serves one method only.
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    server.add_insecure_port(f"127.0.0.1:{config.port}")
    server.start()
    print(READY, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
