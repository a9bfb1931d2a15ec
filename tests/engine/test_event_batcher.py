import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from darkroom_server.backends.fake import fake_image
from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    Event,
    ImageReady,
    JobFinished,
    SampleProgress,
    StageSeconds,
)
from darkroom_server.ipc.channel import Channel, ChannelClosed
from darkroom_server.ipc.event_batcher import TOGETHER_SECONDS, EventBatcher
from tests.server.jobs import make_job

DECODED = DecodeDone(model="demo", width=64, height=64, seconds=0.01)
FINISHED = JobFinished("a", StageSeconds())


def step(number: int) -> SampleProgress:
    return SampleProgress(job_id="a", image_index=0, step=number, steps=20, rows=2, seconds=0.01)


def passed(number: int) -> BatchDone:
    return BatchDone(model="demo", width=64, height=64, rows=2, seconds=0.01, samples=number)


class Rig:
    """An outbox whose time is told, and the other end of its channel."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.now = 100.0
        self.channel, self._end = Channel(ours.detach()), Channel(theirs.detach())
        self.outbox = EventBatcher(self.channel, lambda: self.now)

    def step(self, number: int) -> None:
        self.outbox.tell(step(number))
        self.outbox.tell(passed(number))

    def messages(self) -> list[object]:
        """All that was sent, and the end."""
        self.channel.close()
        found = []
        try:
            while True:
                found.append(self._end.receive())
        except ChannelClosed:
            return found

    def close(self) -> None:
        self._end.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with closing(Rig()) as rig:
        yield rig


def test_a_step_goes_with_its_pass(rig: Rig) -> None:
    rig.outbox.tell(step(1))
    rig.outbox.tell(step(1))
    rig.outbox.tell(passed(2))
    assert rig.messages() == [(step(1), step(1), passed(2))]


def test_quick_passes_go_together(rig: Rig) -> None:
    for number in range(1, 6):
        rig.step(number)
        rig.now += TOGETHER_SECONDS / 2
    assert rig.messages() == [
        (step(1), passed(1)),
        (step(2), passed(2), step(3), passed(3)),
        (step(4), passed(4), step(5), passed(5)),
    ]


def test_a_last_step_is_told_at_once(rig: Rig) -> None:
    for number in (18, 19, 20):
        rig.step(number)
    assert rig.messages() == [
        (step(18), passed(18)),
        (step(19), passed(19), step(20), passed(20)),
    ]


def test_slow_passes_are_told_one_by_one(rig: Rig) -> None:
    for number in (1, 2):
        rig.step(number)
        rig.now += 2 * TOGETHER_SECONDS
    assert rig.messages() == [(step(1), passed(1)), (step(2), passed(2))]


def test_all_else_is_told_at_once_and_in_order(rig: Rig) -> None:
    rig.step(1)
    rig.step(2)
    rig.outbox.tell(DECODED)
    rig.outbox.tell(FINISHED)
    assert rig.messages() == [(step(1), passed(1)), (step(2), passed(2), DECODED), (FINISHED,)]


def test_an_image_goes_alone_behind_what_was_held(rig: Rig) -> None:
    ready = ImageReady(job_id="a", image_index=0, image=fake_image(make_job("a"), 0))
    rig.step(1)
    rig.step(2)
    rig.outbox.tell(ready)
    assert rig.messages() == [(step(1), passed(1)), (step(2), passed(2)), ready]


def test_threads_do_not_tear_messages(rig: Rig) -> None:
    """Whoever tells, each event arrives once, and those of a thread in their order."""

    def tell(events: list[Event]) -> None:
        for event in events:
            rig.outbox.tell(event)

    many: list[list[Event]] = [
        [JobFinished(f"{thread}-{index}", StageSeconds()) for index in range(50)]
        for thread in range(4)
    ]
    steps: list[Event] = [each for n in range(50) for each in (step(n), passed(n))]
    threads = [threading.Thread(target=tell, args=(events,)) for events in (*many, steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.outbox.tell(DECODED)  # Takes along what is held.
    told = [event for message in rig.messages() if isinstance(message, tuple) for event in message]
    assert [e for e in told if isinstance(e, SampleProgress | BatchDone)] == steps
    for events in many:
        assert [event for event in told if event in events] == events
