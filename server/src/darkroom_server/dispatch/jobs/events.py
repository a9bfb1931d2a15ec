"""What the waiters of a job are told between its acceptance and its end."""

from dataclasses import dataclass

from darkroom_server.core.events import PreviewReady, SampleProgress


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits, with ``position`` others before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """The first pass begins."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The engine died, and the job is run again; ``crashes`` engines died with it so far."""

    crashes: int


@dataclass(frozen=True, slots=True)
class ImageDone:
    """One image is finished; it lies with the job, so that a waiter holds no copy."""

    image_index: int


JobEvent = Queued | Started | Restarted | SampleProgress | PreviewReady | ImageDone
