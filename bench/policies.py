"""Ways to choose the samples of a pass: the engine's own, and others to hold it against."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from darkroom_server.core import order
from darkroom_server.core.order import OrderKey, pick

Policy = Callable[[Sequence[OrderKey]], list[OrderKey]]


@contextmanager
def seconds_per_step(seconds: float) -> Iterator[None]:
    """Another patience for ``core.order`` while the context lasts."""
    usual = order.SECONDS_PER_STEP
    order.SECONDS_PER_STEP = seconds
    try:
        yield
    finally:
        order.SECONDS_PER_STEP = usual


def wide(images: int) -> Policy:
    """What the engine does: the most urgent, up to ``images``."""
    return lambda keys: pick(keys, 2 * images)


def narrow_below(residents: int, images: int, most: int) -> Policy:
    """Passes of ``images`` while fewer than ``residents`` are there, else of ``most``."""
    return lambda keys: pick(keys, 2 * (images if len(keys) < residents else most))


def narrow_for_short(steps: int, images: int, most: int) -> Policy:
    """Passes of ``images`` while the most urgent has at most ``steps`` left, else of ``most``."""

    def choose(keys: Sequence[OrderKey]) -> list[OrderKey]:
        chosen = pick(keys, 2 * most)
        return chosen[:images] if chosen[0].remaining_steps <= steps else chosen

    return choose


def near(seconds: float, most: int) -> Policy:
    """Only those whose goal is within ``seconds`` of the most urgent one's."""

    def choose(keys: Sequence[OrderKey]) -> list[OrderKey]:
        chosen = pick(keys, 2 * most)
        return [key for key in chosen if key.goal <= chosen[0].goal + seconds]

    return choose


def greedy(power: float, pass_seconds: Callable[[int], float], most: int) -> Policy:
    """The shortest ones, as many as bring most worth a second.

    A step of a sample is worth ``remaining_steps ** -power``: 0 is for throughput alone, 1 for
    finishing what is nearly done.
    """

    def choose(keys: Sequence[OrderKey]) -> list[OrderKey]:
        ordered = sorted(keys, key=lambda key: (key.remaining_steps, key.submitted_at))[:most]
        worth = 0.0
        rates = []
        for images, key in enumerate(ordered, 1):
            worth += key.remaining_steps**-power
            rates.append(worth / pass_seconds(images))
        return ordered[: rates.index(max(rates)) + 1]

    return choose
