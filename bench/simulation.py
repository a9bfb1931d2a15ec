"""A discrete-event simulation of the engine's loop and of its rivals: no torch, no real time.

It has the loop's rhythm (newcomers join between passes, finished images are decoded one at a time
before the next pass) and a model of the machine: how long a pass and a decode take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.arrivals import Arrivals, Drawn
from bench.batching import serve
from bench.policies import Policy
from bench.workload import Request
from darkroom_server.core.order import OrderKey


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds that a pass over so many images takes, and the decode of one.

    The defaults were measured with guidance, so two rows an image, on 2 CPU cores.
    """

    passes: dict[int, float] = field(
        default_factory=lambda: {1: 0.025, 2: 0.035, 4: 0.060, 8: 0.106}
    )
    decode: float = 0.040

    def pass_seconds(self, images: int) -> float:
        """Between the measured counts, and beyond the last, on a straight line."""
        counts = sorted(self.passes)
        above = next((i for i, count in enumerate(counts) if count >= images), len(counts) - 1)
        high = max(1, above)
        (x, y), (x2, y2) = ((count, self.passes[count]) for count in counts[high - 1 : high + 1])
        return y + (y2 - y) / (x2 - x) * (images - x)

    def capacity(self, requests: Sequence[Request]) -> float:
        """Images/s that one ``pipe()`` call after another makes of ``requests``."""
        steps = sum(request.steps for request in requests)
        return len(requests) / (steps * self.pass_seconds(1) + len(requests) * self.decode)


class SimulatedClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def wait_until(self, moment: float) -> None:
        """Jump to ``moment``, unless it is past."""
        self._now = max(self._now, moment)

    def spend(self, seconds: float) -> None:
        """Let work take ``seconds``."""
        self._now += seconds


def simulate_batches(arrivals: Arrivals, machine: Machine, most: int) -> list[Drawn]:
    """``pipe()`` on up to ``most`` requests of equal settings."""
    clock = SimulatedClock()

    def draw(batch: list[Request]) -> None:
        step = machine.pass_seconds(len(batch))
        clock.spend(batch[0].steps * step + len(batch) * machine.decode)

    return serve(arrivals, clock, draw, most)


def simulate_loop(arrivals: Arrivals, machine: Machine, policy: Policy) -> list[Drawn]:
    """The engine's loop, with ``policy`` choosing the samples of each pass."""
    clock = SimulatedClock()
    resident: dict[tuple[str, int], OrderKey] = {}
    requests: dict[tuple[str, int], Request] = {}
    drawn: list[Drawn] = []
    while True:
        for at, request in arrivals.until(clock.now()):
            key = OrderKey(
                id=("", request.index), submitted_at=at, remaining_steps=request.steps, rows=2
            )
            resident[key.id] = key
            requests[key.id] = request
        if not resident:
            moment = arrivals.next_at()
            if moment is None:
                return drawn
            clock.wait_until(moment)
            continue
        chosen = policy(list(resident.values()))
        clock.spend(machine.pass_seconds(len(chosen)))
        for key in chosen:
            resident[key.id] = replace(key, remaining_steps=key.remaining_steps - 1)
        for key in chosen:
            if resident[key.id].remaining_steps:
                continue
            del resident[key.id]
            clock.spend(machine.decode)
            drawn.append(Drawn.of(requests[key.id], key.submitted_at, clock.now()))
            arrivals.answered(clock.now())
