"""``pipe()`` behind a peer's own way to call it."""

import threading
import time
from collections.abc import Sequence

from bench.peers.serving import Serving, by_settings
from bench.peers.trace import Trace
from bench.pipelines import Pipelines
from bench.workload import Request


class Drawer:
    """Draws on the thread that made it, and on no other: OpenMP keeps a pool for each thread."""

    def __init__(self, serving: Serving) -> None:
        self._pipelines = Pipelines(serving.folder, serving.runtime, serving.widest)
        self._trace = Trace(serving.trace)
        self._widest = serving.widest
        self._thread = threading.get_ident()

    def draw(self, requests: Sequence[Request]) -> list[bytes]:
        """The PNG files of ``requests``, in their order; one call for those of equal settings."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("a second thread calls the model: the comparison would be unfair")
        images: dict[int, bytes] = {}
        for call in by_settings(requests, self._widest):
            began = time.monotonic()
            drawn = self._pipelines.images(call)
            self._trace.note(time.monotonic() - began, [request.index for request in call])
            images.update((id(r), image) for r, image in zip(call, drawn, strict=True))
        return [images[id(request)] for request in requests]
