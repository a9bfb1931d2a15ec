"""(b) LitServe with batching; within a batch, one call of ``pipe()`` for equal settings."""

from typing import Any

import litserve
from fastapi import Response

from bench.peers.servers.config import ServerConfig, from_wire
from bench.peers.servers.sd_pipeline import SdPipeline
from bench.workload.requests import Request

SECONDS = 600
"""Request timeout; LitServe's default of 30 would end an overload early."""


class Api(litserve.LitAPI):
    """``predict`` runs on the main thread of the one worker."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(max_batch_size=config.max_batch_images, batch_timeout=config.batch_timeout)
        self._config = config

    def setup(self, device: str) -> None:
        """Load the model."""
        self._pipeline = SdPipeline(self._config)

    def decode_request(self, request: dict[str, Any]) -> Request:
        """From JSON."""
        return from_wire(request)

    def batch(self, inputs: list[Request]) -> list[Request]:
        """Unchanged."""
        return inputs

    def predict(self, x: list[Request]) -> list[bytes]:
        """Generate a batch."""
        return self._pipeline.generate(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """Unchanged."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """The file itself."""
        return Response(output, media_type="image/png")


def main() -> None:
    """Serve until killed."""
    config = ServerConfig.of_command_line(__doc__)
    server = litserve.LitServer(
        Api(config), accelerator="cpu", workers_per_device=1, timeout=SECONDS
    )
    server.run(
        host="127.0.0.1",
        port=config.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
