"""Reads the body of a request within limits, and decodes JSON."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive

from darkroom_server.core.caller import Caller
from darkroom_server.dispatch import counted_as
from darkroom_server.http.errors import HttpError

BODY_SECONDS = 20.0
"""The most that a JSON body may take to arrive, its wait for a place included."""

MAX_RECEIVING = 128
"""Bodies that are received at once, in the process."""

LARGE_BYTES = 1024**2
LARGE_BODY_SECONDS = 60.0
MAX_RECEIVING_LARGE = 8
MAX_RECEIVING_LARGE_PER_CALLER = 2
"""Forms with pictures have more time, and are received a few at once: each is in memory."""

MAX_RECEIVING_PER_CALLER = 16
"""So that slow bodies of one caller delay no other caller."""

MAX_DEPTH_MESSAGE = "the body is nested too deeply"


@dataclass(frozen=True, slots=True)
class _Limits:
    seconds: float
    at_once: int
    per_caller: int


def _limits(max_bytes: int) -> _Limits:
    if max_bytes > LARGE_BYTES:
        return _Limits(LARGE_BODY_SECONDS, MAX_RECEIVING_LARGE, MAX_RECEIVING_LARGE_PER_CALLER)
    return _Limits(BODY_SECONDS, MAX_RECEIVING, MAX_RECEIVING_PER_CALLER)


class BodyReader:
    """Receives bodies, a bounded number of them at once."""

    def __init__(self) -> None:
        self._places: dict[int, asyncio.Semaphore] = {}
        self._places_of: dict[tuple[str, int], asyncio.Semaphore] = {}
        self._reading: Counter[tuple[str, int]] = Counter()

    async def read(
        self, receive: Receive, headers: Headers, caller: Caller, max_bytes: int
    ) -> bytes:
        """The body; raises ``HttpError`` if it is too large or too slow.

        Raises ``ConnectionError`` if the caller disconnects.
        """
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            raise _too_large(max_bytes)
        limits = _limits(max_bytes)
        key = counted_as(caller), max_bytes
        places = self._places.setdefault(max_bytes, asyncio.Semaphore(limits.at_once))
        own_places = self._places_of.setdefault(key, asyncio.Semaphore(limits.per_caller))
        self._reading[key] += 1
        try:
            async with asyncio.timeout(limits.seconds), own_places, places:
                return await _read(receive, max_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {limits.seconds:g} s"
            raise HttpError(408, "slow_body", message, {"connection": "close"}) from None
        finally:
            self._reading[key] -= 1
            if not self._reading[key]:
                del self._reading[key], self._places_of[key]


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> HttpError:
    # The connection stays open: a caller that still sends would not read the answer otherwise.
    return HttpError(413, "body_too_large", f"the body must have at most {max_bytes} bytes")


def json_object(headers: Headers, body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; raises ``HttpError``.

    Only ``application/json`` is read: pages of other origins may send forms and plain text without
    asking first.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "send JSON, with Content-Type: application/json"
        raise HttpError(415, "unsupported_content_type", message)
    try:
        value = json.loads(body, parse_constant=_reject_constant)
    except RecursionError:
        raise HttpError(400, "invalid_json", MAX_DEPTH_MESSAGE) from None
    except ValueError as error:
        raise HttpError(400, "invalid_json", f"the body is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise HttpError(400, "invalid_json", "the body must be a JSON object")
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
