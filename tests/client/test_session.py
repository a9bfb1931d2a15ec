"""The session of one job, message by message, without a wire."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_client import (
    DarkroomError,
    DeadlineExceeded,
    Event,
    Finished,
    ImageReady,
    Overloaded,
    Progress,
    Restarted,
    Retry,
    ServerError,
    Unavailable,
    UnknownRequest,
)
from darkroom_client._protocol.session import MAX_BACKENDS_PROBED, GenerationSession

LOST = Unavailable("lost", code="UNAVAILABLE")
GONE = UnknownRequest("unknown", code="NOT_FOUND", reason="UNKNOWN_REQUEST")


def following(count: int = 1, timeout: float | None = 60.0, **retry: Any) -> GenerationSession:
    request = generation_pb2.GenerateRequest(
        prompt="a star", seed=2**63 - 2, image_count=count, request_id="r-1"
    )
    return GenerationSession(
        "r-1", address="a:1", timeout=timeout, metadata=(), retry=Retry(**retry), request=request
    )


def event(**fields: Any) -> generation_pb2.GenerationEvent:
    return generation_pb2.GenerationEvent(**fields)


def accepted(count: int = 1, joined: bool = False) -> generation_pb2.GenerationEvent:
    message = generation_pb2.Accepted(request_id="r-1", seeds=range(count), joined=joined)
    return event(accepted=message)


def chunk(index: int, data: bytes, *, size: int, offset: int = 0) -> Any:
    head = generation_pb2.Image(format=types_pb2.IMAGE_FORMAT_PNG, width=8, height=8)
    message = generation_pb2.ImageChunk(image_index=index, size=size, offset=offset, data=data)
    if offset == 0:
        message.image.CopyFrom(head)
    return event(image=message)


FINISHED = event(finished=generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_COMPLETED))


def fed(follow: GenerationSession, *events: generation_pb2.GenerationEvent) -> list[Event]:
    return [event for message in events for event in follow.feed(message)]


def forgotten(follow: GenerationSession) -> None:
    """Every probed backend answers that it does not know the job."""
    for _ in range(MAX_BACKENDS_PROBED):
        assert isinstance(follow.next_call().message, generation_pb2.WatchGenerationRequest)
        assert follow.on_call_ended(GONE).seconds < 0.1


def test_an_unknown_job_is_probed_on_several_backends() -> None:
    follow = following()
    follow.next_call()
    fed(follow, accepted())
    follow.on_call_ended(LOST)
    for _ in range(MAX_BACKENDS_PROBED - 1):
        follow.next_call()
        follow.on_call_ended(GONE)

    assert fed(follow, accepted(joined=True)) == []
    forgotten(follow)
    assert isinstance(follow.next_call().message, generation_pb2.GenerateStreamRequest)


def test_chunks_make_an_image() -> None:
    follow = following()
    follow.next_call()

    events = fed(follow, accepted(), chunk(0, b"ab", size=3), chunk(0, b"c", size=3, offset=2))

    assert isinstance(events[-1], ImageReady)
    assert events[-1].image.data == b"abc"
    assert isinstance(fed(follow, FINISHED)[0], Finished)
    assert follow.ended


def wrong_pieces() -> Iterator[list[generation_pb2.GenerationEvent]]:
    first = chunk(0, b"ab", size=4)
    yield [chunk(0, b"cd", size=4, offset=2)]
    yield [first, chunk(0, b"d", size=4, offset=3)]
    yield [first, first]
    yield [first, chunk(1, b"cd", size=4, offset=2)]
    yield [first, chunk(0, b"cde", size=4, offset=2)]
    yield [first, chunk(0, b"", size=4, offset=2)]
    yield [first, FINISHED]
    yield [FINISHED]
    yield [chunk(1, b"ab", size=2), FINISHED]
    yield [chunk(0, b"ab", size=1)]


@pytest.mark.parametrize("events", list(wrong_pieces()))
def test_chunks_that_do_not_fit_are_an_error(events: list[Any]) -> None:
    follow = following()
    follow.next_call()
    fed(follow, accepted())

    with pytest.raises(ServerError) as caught:
        fed(follow, *events)

    assert caught.value.reason == "UNREADABLE_REPLY"
    # The server may still run the job of a caller that cannot read its events.
    assert follow.needs_cancel
    assert follow.ended


def test_chunks_start_again_with_a_new_connection() -> None:
    follow = following()
    follow.next_call()
    fed(follow, accepted(), chunk(0, b"ab", size=3))
    follow.on_call_ended(LOST)

    message = follow.next_call().message
    assert message == generation_pb2.WatchGenerationRequest(request_id="r-1")
    events = fed(follow, accepted(joined=True), chunk(0, b"abc", size=3), FINISHED)

    assert [type(item) for item in events] == [ImageReady, Finished]


def test_arrived_images_are_neither_emitted_nor_requested_twice() -> None:
    follow = following(count=4)
    follow.next_call()
    images = [chunk(index, b"ab", size=2) for index in range(4)]
    fed(follow, accepted(4), images[0])
    follow.on_call_ended(LOST)
    assert isinstance(follow.next_call().message, generation_pb2.WatchGenerationRequest)
    events = fed(follow, accepted(4, joined=True), images[0], images[1])
    assert [item.image_index for item in events if isinstance(item, ImageReady)] == [1]

    follow.on_call_ended(LOST)
    follow.next_call()
    forgotten(follow)
    message: Any = follow.next_call().message
    rest = message.generation
    # Image 2 of the seed 2^63 - 2 has the seed 0.
    assert (rest.seed, rest.image_count, rest.request_id) == (0, 2, "r-1")
    events = fed(follow, accepted(2), event(progress=generation_pb2.Progress(image_index=1)))
    assert events[0] == Restarted(times=1)
    assert isinstance(events[1], Progress)
    assert events[1].image_index == 3
    events = fed(follow, images[0], images[1], FINISHED)

    assert [item.image_index for item in events if isinstance(item, ImageReady)] == [2, 3]
    assert follow.result is not None
    assert len(follow.result.images) == 4


def test_attempts_are_limited_before_acceptance() -> None:
    follow = following(attempts=3)

    for _ in range(2):
        assert isinstance(follow.next_call().message, generation_pb2.GenerateStreamRequest)
        assert follow.on_call_ended(LOST).seconds > 0
    follow.next_call()
    with pytest.raises(Unavailable):
        follow.on_call_ended(LOST)

    once = following(attempts=1)
    once.next_call()
    with pytest.raises(Unavailable):
        once.on_call_ended(LOST)


def test_waits_grow_and_are_reset_by_an_event() -> None:
    follow = following(initial_backoff=1.0, max_backoff=3.0)
    follow.next_call()
    fed(follow, accepted())

    waits = [follow.on_call_ended(LOST).seconds for _ in range(3)]
    fed(follow, accepted(joined=True))
    again = follow.on_call_ended(LOST).seconds

    assert 0.8 <= waits[0] <= 1.2
    assert 1.6 <= waits[1] <= 2.4
    assert 2.4 <= waits[2] <= 3.6
    assert 0.8 <= again <= 1.2
    loading = Unavailable("loading", reason="MODEL_LOADING", retry_after=7.0)
    assert follow.on_call_ended(loading).seconds == 7.0


def test_no_wait_is_longer_than_the_remaining_time() -> None:
    follow = following(timeout=2.0, initial_backoff=5.0)
    follow.next_call()
    fed(follow, accepted())

    assert 0.5 < follow.on_call_ended(LOST).seconds <= 1.0


LOADING = Unavailable("loading", code="UNAVAILABLE", reason="MODEL_LOADING", retry_after=2.0)
CUT_SHORT = DeadlineExceeded("no answer", code="DEADLINE_EXCEEDED")


def test_retry_after_of_a_loading_server_is_used() -> None:
    follow = following(timeout=60.0)

    for _ in range(4):
        follow.next_call()
        assert follow.on_call_ended(LOADING).seconds == 2.0


def test_a_job_that_no_server_accepts_in_time_ends_with_the_reason() -> None:
    follow = following(timeout=0.3)
    waits = []

    def until_the_end() -> None:
        while True:
            follow.next_call()
            waits.append(follow.on_call_ended(LOADING).seconds)
            time.sleep(waits[-1])

    with pytest.raises(Unavailable) as caught:
        until_the_end()

    # The server's hint of 2 s ends nothing: there are tries until the time is up.
    assert len(waits) >= 1
    assert caught.value is LOADING
    assert follow.ended


def test_a_deadline_during_a_retry_keeps_the_earlier_reason() -> None:
    follow = following(timeout=1.0, attempts=2, initial_backoff=0.01)
    follow.next_call()
    assert follow.on_call_ended(LOST).seconds < 1.0
    follow.next_call()

    with pytest.raises(Unavailable) as caught:
        follow.on_call_ended(CUT_SHORT)
    assert caught.value is LOST

    once = following(timeout=60.0)
    once.next_call()
    with pytest.raises(DeadlineExceeded):
        once.on_call_ended(CUT_SHORT)


def test_a_full_queue_is_retried_only_after_a_lost_place() -> None:
    full = Overloaded("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after=2.0)
    follow = following()
    follow.next_call()
    fed(follow, accepted())
    follow.on_call_ended(LOST)
    forgotten(follow)

    assert follow.on_call_ended(full).seconds == 2.0

    fresh = following()
    fresh.next_call()
    with pytest.raises(Overloaded):
        fresh.on_call_ended(full)


@pytest.mark.parametrize("reason", ["", "ENGINE_FAILED"])
def test_grpc_errors_of_a_broken_stream_are_retried(reason: str) -> None:
    follow = following(attempts=3)
    follow.next_call()
    fed(follow, accepted())
    error: DarkroomError = ServerError("Stream removed", code="UNKNOWN", reason=reason)

    if reason:
        with pytest.raises(ServerError):
            follow.on_call_ended(error)
        assert not follow.needs_cancel
        return
    assert [follow.on_call_ended(error).seconds > 0 for _ in range(2)] == [True, True]
    with pytest.raises(ServerError):
        follow.on_call_ended(error)
    assert follow.needs_cancel


def test_a_stream_that_ends_too_early_continues() -> None:
    follow = following()
    follow.next_call()
    fed(follow, accepted())

    assert follow.on_call_ended(None).seconds > 0
    assert isinstance(follow.next_call().message, generation_pb2.WatchGenerationRequest)


def test_events_newer_than_the_client_are_ignored() -> None:
    follow = following()
    follow.next_call()
    preview = generation_pb2.Preview(format=types_pb2.ImageFormat.ValueType(99))

    assert fed(follow, event(), event(preview=preview)) == []


class Stubs:
    """Shows which stub a call uses."""

    health_checked_generation = SimpleNamespace(GenerateStream="checked")
    generation = SimpleNamespace(GenerateStream="plain", WatchGeneration="watch")


def way(follow: GenerationSession) -> str:
    """The stub of the next call."""
    stubs: Any = Stubs
    return str(follow.next_call().method(stubs))


def test_if_no_server_accepts_jobs_any_is_tried_once_at_once() -> None:
    follow = following(attempts=2)

    assert way(follow) == "checked"
    assert follow.on_call_ended(LOST, sent=False).seconds == 0.0
    assert way(follow) == "plain"
    assert follow.on_call_ended(LOST, sent=False).seconds > 0.0
    assert way(follow) == "checked"
    assert follow.on_call_ended(LOST, sent=False).seconds == 0.0
    assert way(follow) == "plain"
    with pytest.raises(Unavailable):
        follow.on_call_ended(LOST, sent=False)


def test_a_lost_try_counts_and_the_next_skips_the_health_check() -> None:
    follow = following(attempts=2)

    assert way(follow) == "checked"
    assert follow.on_call_ended(LOST).seconds > 0.0
    assert way(follow) == "plain"
    fed(follow, accepted())
    follow.on_call_ended(LOST)
    assert way(follow) == "watch"


def test_after_a_reason_the_next_try_is_health_checked() -> None:
    follow = following()

    assert way(follow) == "checked"
    follow.on_call_ended(LOADING)
    assert way(follow) == "checked"
