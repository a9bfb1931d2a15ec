"""(b) LitServe with batching; within a batch, one call of ``pipe()`` for equal settings."""

from typing import Any

import litserve
from fastapi import Response

from bench.peers.drawer import Drawer
from bench.peers.serving import Serving, from_wire
from bench.workload import Request

SECONDS = 600
"""The longest that a request may take; LitServe's own default of 30 ends overloads early."""


class Api(litserve.LitAPI):
    """Decodes, draws and encodes; ``predict`` runs on the main thread of the one worker."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(max_batch_size=serving.widest, batch_timeout=serving.window)
        self._serving = serving

    def setup(self, device: str) -> None:
        """Load the model."""
        self._drawer = Drawer(self._serving)

    def decode_request(self, request: dict[str, Any]) -> Request:
        """From JSON."""
        return from_wire(request)

    def batch(self, inputs: list[Request]) -> list[Request]:
        """As they are."""
        return inputs

    def predict(self, x: list[Request]) -> list[bytes]:
        """Draw a batch."""
        return self._drawer.draw(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """As they are."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """The file itself."""
        return Response(output, media_type="image/png")


def main() -> None:
    """Serve until killed."""
    serving = Serving.of_command_line(__doc__)
    server = litserve.LitServer(
        Api(serving), accelerator="cpu", workers_per_device=1, timeout=SECONDS
    )
    server.run(
        host="127.0.0.1",
        port=serving.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
