"""A short, mixed load, and what its callers received."""

import random
import threading
import time
from dataclasses import dataclass, field

from darkroom_client import Client, DarkroomError

STEPS = (8, 12, 20, 30)
SIZES = (64, 64, 64, 96)
IMPATIENT = 0.15
"""Share of the calls with a short timeout."""


@dataclass(slots=True)
class Received:
    """What the callers received; ``seconds`` is the sum of the latencies of finished calls."""

    finished: int = 0
    images: int = 0
    seconds: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, images: int, seconds: float) -> None:
        """Count a call that finished."""
        with self._lock:
            self.finished += 1
            self.images += images
            self.seconds += seconds

    def failure(self, error: DarkroomError) -> None:
        """Count a call that failed."""
        with self._lock:
            name = type(error).__name__
            self.failed[name] = self.failed.get(name, 0) + 1


def run_load(address: str, *, seconds: float, callers: int = 4, seed: int = 7) -> Received:
    """Let ``callers`` send one request after another, until ``seconds`` have passed."""
    received = Received()
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=_call, args=(address, until, random.Random(seed + n), received))
        for n in range(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return received


def _call(address: str, until: float, rng: random.Random, received: Received) -> None:
    with Client(address, insecure=True) as client:
        while time.monotonic() < until:
            size = rng.choice(SIZES)
            timeout = 0.3 if rng.random() < IMPATIENT else 120.0
            began = time.monotonic()
            try:
                result = client.generate(
                    f"a large {rng.choice(('red', 'blue', 'green'))} circle",
                    steps=rng.choice(STEPS),
                    image_count=rng.choice((1, 1, 2)),
                    width=size,
                    height=size,
                    seed=rng.randrange(1000),
                    timeout=timeout,
                )
            except DarkroomError as error:
                received.failure(error)
            else:
                received.answer(len(result.images), time.monotonic() - began)
