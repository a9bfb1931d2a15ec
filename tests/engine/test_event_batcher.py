import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from darkroom_server.backends.fake import fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    EncodeDone,
    Event,
    ImageReady,
    JobFinished,
    JobTaken,
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


def batch_done(number: int) -> BatchDone:
    return BatchDone(model="demo", width=64, height=64, rows=2, seconds=0.01, samples=number)


class Rig:
    """An event batcher with a clock that the test sets, and the other end of its channel."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.now = 100.0
        self.channel, self._end = Channel(ours.detach()), Channel(theirs.detach())
        self.batcher = EventBatcher(self.channel, lambda: self.now)

    def step(self, number: int) -> None:
        self.batcher.emit(step(number))
        self.batcher.emit(batch_done(number))

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


def test_a_step_is_sent_with_its_batch(rig: Rig) -> None:
    rig.batcher.emit(step(1))
    rig.batcher.emit(step(1))
    rig.batcher.emit(batch_done(2))
    assert rig.messages() == [(step(1), step(1), batch_done(2))]


def test_fast_batches_are_sent_together(rig: Rig) -> None:
    for number in range(1, 6):
        rig.step(number)
        rig.now += 0.51 * TOGETHER_SECONDS
    assert rig.messages() == [
        (step(1), batch_done(1)),
        (step(2), batch_done(2), step(3), batch_done(3)),
        (step(4), batch_done(4), step(5), batch_done(5)),
    ]


def test_a_last_step_is_sent_at_once(rig: Rig) -> None:
    for number in (18, 19, 20):
        rig.step(number)
    assert rig.messages() == [
        (step(18), batch_done(18)),
        (step(19), batch_done(19), step(20), batch_done(20)),
    ]


def test_slow_batches_are_sent_one_by_one(rig: Rig) -> None:
    for number in (1, 2):
        rig.step(number)
        rig.now += 2 * TOGETHER_SECONDS
    assert rig.messages() == [(step(1), batch_done(1)), (step(2), batch_done(2))]


def test_other_events_are_sent_at_once_and_in_order(rig: Rig) -> None:
    taken = JobTaken("b")
    rig.step(1)
    rig.step(2)
    rig.batcher.emit(taken)
    rig.batcher.emit(FINISHED)
    assert rig.messages() == [
        (step(1), batch_done(1)),
        (step(2), batch_done(2), taken),
        (FINISHED,),
    ]


def test_the_time_of_a_decode_or_of_prompts_waits_for_the_next_event(rig: Rig) -> None:
    encoded = EncodeDone(model="demo", prompts=1, seconds=0.01, cache_bytes=0)
    rig.batcher.emit(DECODED)
    rig.batcher.emit(FINISHED)
    rig.batcher.emit(encoded)
    rig.step(1)
    rig.step(2)
    rig.batcher.emit(FINISHED)
    assert rig.messages() == [
        (DECODED, FINISHED),
        (encoded, step(1), batch_done(1), step(2), batch_done(2), FINISHED),
    ]


def test_an_image_is_sent_alone_after_the_held_events(rig: Rig) -> None:
    ready = ImageReady(
        job_id="a", image_index=0, image=fake_image(make_job("a"), 0, fake_model(), 2)
    )
    rig.step(1)
    rig.step(2)
    rig.batcher.emit(ready)
    assert rig.messages() == [(step(1), batch_done(1)), (step(2), batch_done(2)), ready]


def test_events_of_many_threads_arrive_once_and_in_order(rig: Rig) -> None:
    """Each event arrives once, and the events of one thread keep their order."""

    def emit(events: list[Event]) -> None:
        for event in events:
            rig.batcher.emit(event)

    many: list[list[Event]] = [
        [JobFinished(f"{thread}-{index}", StageSeconds()) for index in range(50)]
        for thread in range(4)
    ]
    steps: list[Event] = [each for n in range(50) for each in (step(n), batch_done(n))]
    threads = [threading.Thread(target=emit, args=(events,)) for events in (*many, steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.batcher.emit(FINISHED)  # Sends the held events too.
    received = [
        event for message in rig.messages() if isinstance(message, tuple) for event in message
    ]
    assert [e for e in received if isinstance(e, SampleProgress | BatchDone)] == steps
    for events in many:
        assert [event for event in received if event in events] == events
