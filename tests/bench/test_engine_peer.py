"""What a benchmark learns from an engine besides its images."""

import itertools
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

from bench.inprocess.engine import EnginePeer
from darkroom_server.core.events import EngineReady, Event, MemoryReport


class Reporting:
    """An engine that reports its memory again and again; its peak was highest at first."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def start(self, emit: Callable[[Event], None]) -> None:
        info: Any = None
        emit(EngineReady((info,), 0.0))
        self._thread = threading.Thread(target=self._report, args=(emit,))
        self._thread.start()

    def _report(self, emit: Callable[[Event], None]) -> None:
        for peak in itertools.chain([7], itertools.repeat(3)):
            emit(MemoryReport(device="cuda:0", by_kind={"peak": peak}, host_rss=1))
            if self._closed.wait(0.001):
                return

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def test_the_peak_is_the_highest_that_the_engine_reported() -> None:
    reporting: Any = Reporting()
    with closing(EnginePeer(reporting)) as peer:
        assert peer.peak_bytes() == 7
