"""When the chunks of an image from another server are all there, whatever its size."""

import os
from dataclasses import replace

import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.backends.fake import fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.dispatch import ActiveJob
from darkroom_server.fleet.peers import Watched, _image
from darkroom_server.rpc import event_stream
from tests.server.jobs import make_job

CHUNK = 1000


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 5 * CHUNK + 7])
async def test_an_image_is_complete_with_its_last_chunk(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "CHUNK_BYTES", CHUNK)
    active = ActiveJob(make_job(image_count=2), fake_model())
    images = [
        replace(fake_image(active.job, index, active.model, rows=2), data=os.urandom(size))
        for index in range(2)
    ]
    active.images = dict(enumerate(images))
    begun: dict[int, list[bytes]] = {}
    for index, image in enumerate(images):
        *first, last = messages(active, index)
        for message, event in first:
            assert _image(message, event.image, begun) is None
        found = _image(last[0], last[1].image, begun)
        assert found is not None
        assert (found.index, found.image.data, found.image.seed) == (index, image.data, image.seed)
        assert found.image.replay == image.replay
        assert list(found.image.messages) == [message for message, _ in messages(active, index)]
    assert begun == {}


def messages(active: ActiveJob, index: int) -> list[tuple[bytes, generation_pb2.GenerationEvent]]:
    """As a watching server receives them."""
    with active.subscribe() as subscription:
        events = list(event_stream.image_chunks(subscription, index))
    sent = [
        Watched(event=each).SerializeToString() for each in events if not isinstance(each, bytes)
    ]
    return [(each, Watched.FromString(each).event) for each in sent]
