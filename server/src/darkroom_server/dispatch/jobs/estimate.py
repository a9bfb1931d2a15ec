"""What is expected of a job."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a job would take, in seconds: until its first pass, and from there to its last image.

    ``made_at`` is in ``time.monotonic`` seconds, as ``start_at`` and ``finish_at`` are.
    ``forecast`` is the total before it was corrected by how forecasts were off of late.
    """

    made_at: float
    queue_wait: float
    run_time: float
    forecast: float

    @property
    def total(self) -> float:
        """Seconds until the last image."""
        return self.queue_wait + self.run_time

    @property
    def start_at(self) -> float:
        """The moment of the first pass."""
        return self.made_at + self.queue_wait

    @property
    def finish_at(self) -> float:
        """The moment of the last image."""
        return self.made_at + self.total
