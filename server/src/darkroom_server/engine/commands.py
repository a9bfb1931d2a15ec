"""What an engine is told while it runs; a ``core.job.Job`` by itself is a job to take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a job at the next step boundary."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """End at the next step boundary."""
