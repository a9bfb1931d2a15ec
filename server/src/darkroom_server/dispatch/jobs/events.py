"""What the subscriptions of a job receive between its acceptance and its end."""

from dataclasses import dataclass

from darkroom_server.core.events import PreviewReady, SampleProgress


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits behind ``position`` others."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """The first batch with the job begins."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The engine died and the job runs again; ``crashes`` engines died with it so far."""

    crashes: int


@dataclass(frozen=True, slots=True)
class ImageDone:
    """One image is finished. The job holds it, so that a subscription holds no copy."""

    image_index: int


JobEvent = Queued | Started | Restarted | SampleProgress | PreviewReady | ImageDone
