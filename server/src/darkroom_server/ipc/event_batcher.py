"""What the engine's process tells, in few messages: each takes some of the passes' cores."""

import threading
import time
from collections.abc import Callable

from darkroom_server.core.events import BatchDone, Event, ImageReady, SampleProgress
from darkroom_server.ipc.channel import Channel

TOGETHER_SECONDS = 0.05
"""Passes are told this often at most; a bar that moves twenty times a second is smooth.

A message wakes two threads of the serving process. On two cores that are busy with a pass of 20 ms
this takes half a millisecond from it.
"""


class EventBatcher:
    """Tells the serving process; the steps of quick passes together, all else at once.

    An image's last step is told at once too, for what comes next may take long. Any thread may
    tell. What was told first is sent first.
    """

    def __init__(self, channel: Channel, now: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._now = now
        self._held: list[Event] = []
        self._sent_at = -TOGETHER_SECONDS
        self._lock = threading.Lock()

    def tell(self, event: Event) -> None:
        """Send ``event``, or hold it until more is told. Raises ``ChannelClosed``."""
        with self._lock:
            if isinstance(event, SampleProgress):
                self._held.append(event)
                return  # Its pass is told next.
            now = self._now()
            soon = now - self._sent_at < TOGETHER_SECONDS
            if isinstance(event, BatchDone) and soon and not any(map(_is_last, self._held)):
                self._held.append(event)
                return
            self._sent_at = now
            held, self._held = self._held, []
            if isinstance(event, ImageReady):  # Its bytes follow it, so it goes alone.
                if held:
                    self._channel.send(tuple(held))
                self._channel.send(event)
            else:
                self._channel.send((*held, event))


def _is_last(event: Event) -> bool:
    return isinstance(event, SampleProgress) and event.step == event.steps
