"""How long a job is expected to take."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds until the first batch (``queue_wait``), and from there to the last image.

    ``made_at`` is in ``time.monotonic`` seconds, as ``start_at`` and ``finish_at`` are.
    ``simulated`` is the total as simulated, before the calibration corrected it. ``optimistic``:
    the total if everything goes as well as it does at times. ``model_finish_at``: when all jobs
    of each model have finished, this one and those that were here before it; of several engines,
    only those of ``engine``: the index of the one that the job enters at once, None if it waits.
    """

    made_at: float
    queue_wait: float
    run_time: float
    simulated: float
    optimistic: float
    model_finish_at: Mapping[str, float] = field(default_factory=dict)
    engine: int | None = None

    @property
    def total(self) -> float:
        """Seconds until the last image."""
        return self.queue_wait + self.run_time

    @property
    def start_at(self) -> float:
        """The time of the first batch."""
        return self.made_at + self.queue_wait

    @property
    def finish_at(self) -> float:
        """The time of the last image."""
        return self.made_at + self.total
