"""Packs the engine's events into few messages, because each message takes CPU time from batches."""

import threading
import time
from collections.abc import Callable

from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    EncodeDone,
    Event,
    ImageReady,
    SampleProgress,
)
from darkroom_server.ipc.channel import Channel

TOGETHER_SECONDS = 0.1
"""The least time between messages of steps; a progress bar with 10 updates a second is smooth.

A message wakes two threads of the serving process. On two cores that are busy with a batch of 20 ms
it costs the batch half a millisecond.
"""


ALWAYS_FOLLOWED = (SampleProgress, EncodeDone, DecodeDone)
"""Events that wait for the next one: for their ``BatchDone``, or for what comes of the image."""


class EventBatcher:
    """Sends events to the serving process: steps of fast batches together, other events at once.

    An image's last step is sent at once too, because its decode may take long. Any thread may emit.
    Events are sent in the order in which they were emitted.
    """

    def __init__(self, channel: Channel, now: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._now = now
        self._held: list[Event] = []
        self._sent_at = -TOGETHER_SECONDS
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        """Send ``event``, or hold it until the next message. Raises ``ChannelClosed``."""
        with self._lock:
            if isinstance(event, ALWAYS_FOLLOWED):
                self._held.append(event)
                return
            now = self._now()
            soon = now - self._sent_at < TOGETHER_SECONDS
            if isinstance(event, BatchDone) and soon and not any(map(_is_last, self._held)):
                self._held.append(event)
                return
            self._sent_at = now
            held, self._held = self._held, []
            if isinstance(event, ImageReady):  # Its bytes follow it, so it is a message of its own.
                if held:
                    self._channel.send(tuple(held))
                self._channel.send(event)
            else:
                self._channel.send((*held, event))


def _is_last(event: Event) -> bool:
    return isinstance(event, SampleProgress) and event.step == event.steps
