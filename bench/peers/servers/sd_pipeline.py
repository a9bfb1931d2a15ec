"""The Stable Diffusion pipeline that the peers' servers call."""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice

from bench.inprocess.pipelines import Pipelines
from bench.peers.servers.config import ServerConfig, Wanted, by_settings
from bench.peers.servers.trace import Trace
from bench.workload.requests import Request


class SdPipeline:
    """Generates only on the thread that created it: OpenMP keeps a pool for each thread."""

    def __init__(self, config: ServerConfig) -> None:
        self._pipelines = Pipelines(
            config.folder, config.runtime, config.max_batch_images, compiled=config.compiled
        )
        self._trace = Trace(config.trace)
        self._max_images = config.max_batch_images
        self._thread = threading.get_ident()

    def generate(self, requests: Sequence[Request]) -> list[bytes]:
        """The PNG files of ``requests``, in their order; one call for those of equal settings."""
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "a second thread calls the model, which would make the comparison unfair"
            )
        return in_calls(requests, self._max_images, self._pipelines.images, self._trace)


def in_calls(
    requests: Sequence[Wanted],
    max_images: int,
    images: Callable[[Sequence[Wanted]], list[bytes]],
    trace: Trace,
) -> list[bytes]:
    """The files of ``requests``, in their order: one call of ``images`` for equal settings."""
    found: dict[int, list[bytes]] = {}
    for call in by_settings(requests, max_images):
        began = time.monotonic()
        files = iter(images(call))
        indexes = [request.index for request in call for _ in range(request.images)]
        trace.record(time.monotonic() - began, indexes)
        found.update((id(request), list(islice(files, request.images))) for request in call)
    return [file for request in requests for file in found[id(request)]]
