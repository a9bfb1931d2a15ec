"""The pipe between the serving process and an engine's."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from darkroom_server.core.events import EncodedImage, ImageReady, Replay
from darkroom_server.core.job import ImageFormat
from darkroom_server.ipc.channel import Channel, ChannelClosed
from darkroom_server.ipc.commands import Cancel

LARGE = 8 << 20
"""Bytes; far more than a pipe holds."""


def image_of(size: int, message_size: int = 2) -> ImageReady:
    """An image of ``size`` bytes, which follow a message of at least ``message_size``."""
    replay = Replay(
        scheduler_class="DDIMScheduler",
        scheduler_config_json="x" * message_size,
        device="cpu",
        library_versions={},
        rows_in_last_pass=2,
        pixels_sha256="",
    )
    image = EncodedImage(
        data=bytes(size),
        format=ImageFormat.RAW_RGB,
        width=1,
        height=1,
        seed=0,
        prompt_truncated=False,
        flagged=False,
        replay=replay,
    )
    return ImageReady(job_id="a", image_index=0, image=image)


def channels() -> tuple[Channel, Channel, int]:
    ours, theirs = socket.socketpair()
    descriptor = theirs.detach()
    return Channel(ours.detach()), Channel(descriptor), descriptor


def test_messages_arrive_as_they_were_sent() -> None:
    ours, theirs, _ = channels()
    for message in (Cancel("a"), image_of(1000), Cancel("b")):
        ours.send(message)
        assert theirs.receive() == message
    ours.close()
    theirs.close()


def test_closing_waits_for_a_message_on_its_way() -> None:
    ours, theirs, descriptor = channels()
    image, closing = image_of(1000, message_size=LARGE), threading.Event()

    def read() -> object:
        assert closing.wait(60)
        return theirs.receive()

    with ThreadPoolExecutor() as threads:
        received = threads.submit(read)
        sent = threads.submit(ours.send, image)
        with socket.socket(fileno=socket.dup(descriptor)) as peek:
            assert peek.recv(1, socket.MSG_PEEK)  # The message has begun.
        closing.set()
        ours.close()
        sent.result(60)
        assert received.result(60) == image
    with pytest.raises(ChannelClosed):
        theirs.receive()
    theirs.close()


def test_both_ends_say_that_it_is_closed() -> None:
    ours, theirs, _ = channels()
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send(Cancel("a"))
    with pytest.raises(ChannelClosed):
        ours.receive()
    with pytest.raises(ChannelClosed):
        theirs.send(Cancel("a"))
    ours.close()
