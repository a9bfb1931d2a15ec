"""A short, mixed load: what callers ask for, and what they saw."""

import random
import threading
import time
from dataclasses import dataclass, field

from darkroom_client import Client, DarkroomError

STEPS = (8, 12, 20, 30)
SIZES = (64, 64, 64, 96)
IMPATIENT = 0.15
"""Part of the callers who do not wait for the end."""


@dataclass(slots=True)
class Seen:
    """What the callers saw; seconds are from each call's beginning to its end."""

    finished: int = 0
    images: int = 0
    seconds: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, images: int, seconds: float) -> None:
        """A call was answered."""
        with self._lock:
            self.finished += 1
            self.images += images
            self.seconds += seconds

    def failure(self, error: DarkroomError) -> None:
        """A call failed."""
        with self._lock:
            name = type(error).__name__
            self.failed[name] = self.failed.get(name, 0) + 1


def run_load(address: str, *, seconds: float, callers: int = 4, seed: int = 7) -> Seen:
    """Let ``callers`` ask for one picture after another, until so many seconds are over."""
    seen = Seen()
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=_call, args=(address, until, random.Random(seed + n), seen))
        for n in range(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def _call(address: str, until: float, chance: random.Random, seen: Seen) -> None:
    with Client(address, insecure=True) as client:
        while time.monotonic() < until:
            size = chance.choice(SIZES)
            timeout = 0.3 if chance.random() < IMPATIENT else 120.0
            began = time.monotonic()
            try:
                result = client.generate(
                    f"a large {chance.choice(('red', 'blue', 'green'))} circle",
                    steps=chance.choice(STEPS),
                    image_count=chance.choice((1, 1, 2)),
                    width=size,
                    height=size,
                    seed=chance.randrange(1000),
                    timeout=timeout,
                )
            except DarkroomError as error:
                seen.failure(error)
            else:
                seen.answer(len(result.images), time.monotonic() - began)
