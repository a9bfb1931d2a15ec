"""The calls that a following makes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from darkroom.v1 import generation_pb2
from darkroom_client._stubs import Stubs


@dataclass(frozen=True, slots=True)
class Attempt:
    """The next call to make."""

    method: Callable[[Stubs], Any]
    message: Message
    timeout: float | None


def watching(request_id: str, timeout: float | None) -> Attempt:
    """Join a job."""
    message = generation_pb2.WatchGenerationRequest(request_id=request_id)
    return Attempt(lambda stubs: stubs.generation.WatchGeneration, message, timeout)


def beginning(
    message: generation_pb2.GenerateStreamRequest, timeout: float | None, *, anywhere: bool
) -> Attempt:
    """Ask for a job, of servers that take some; ``anywhere``: of any other too."""
    if anywhere:
        return Attempt(lambda stubs: stubs.generation.GenerateStream, message, timeout)
    return Attempt(lambda stubs: stubs.beginning.GenerateStream, message, timeout)
