"""Fuzzes the HTTP door: `python -m tests.server.hostile.http_fuzz --inputs 100000`.

Inputs are raw bytes on a connection of their own: JSON and forms with odd values, odd paths and
headers; half of them are damaged. Each must end with an answer that blames the caller, or with the
end of the connection.
"""

import argparse
import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.http import body, connection
from darkroom_server.http import server as http_server
from darkroom_server.http.messages.fields import FORM_FIELDS
from darkroom_server.logs import configure_logs
from darkroom_server.settings import Dispatch, Logs, Results
from tests.server.hostile.fuzz import AT_ONCE, REAL, TEXTS, WHOLE, damaged, statuses_of
from tests.server.http.door import Door, door
from tests.server.uploads.pictures import mask, plain

SECONDS = 0.5
"""For headers and bodies that a damaged length leaves incomplete."""

CLOSED = "closed"
CONTINUE = "100"
ALLOWED = {"200", "204", "400", "403", "404", "405", "408", "413", "415", "421", "422", "504"} | {
    CLOSED
}
"""No input may end with any other status. 204: a preflight. 504: a deadline of nanoseconds."""

PATHS = (
    "generations",
    "generations",
    "edits",
    "variations",
    "estimate",
    "results/anybody/x/0.png?expires=9999999999&signature=00",
    "../../v1/models",
    "%2e%2e/%00",
)
HEADERS = (
    "Idempotency-Key: {}",
    "X-Request-Id: {}",
    "X-Request-Timeout: {}",
    "Authorization: Bearer {}",
    "Origin: {}",
    "Host: {}",
    "Transfer-Encoding: {}",
    "Content-Encoding: {}",
    "Expect: 100-continue",
    "traceparent: {}",
    "X-Forwarded-For: {}",
)
FILES = (b"", b"no picture", mask(), plain()[:100])
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


def inputs(count: int, seed: int) -> Iterator[bytes]:
    """Yield ``count`` inputs; the same seed gives the same inputs."""
    dice = random.Random(seed)
    for number in range(count):
        data = request(dice)
        yield damaged(data, dice) if number % 2 else data


def request(dice: random.Random) -> bytes:
    """One request, of which most parts are valid."""
    path = dice.choice(PATHS)
    method = "POST" if dice.random() < 0.95 else dice.choice(("GET", "HEAD", "OPTIONS", "PUT", "X"))
    form = path in ("edits", "variations")
    if dice.random() < 0.05:
        form = not form
    kind, content = form_of(dice) if form else ("application/json", json_of(dice))
    lines = [f"{method} /v1/images/{path} HTTP/1.1", "Connection: close", f"Content-Type: {kind}"]
    lines += [f"Content-Length: {len(content)}", "Host: localhost"]
    for header in HEADERS:
        if dice.random() < 0.03:
            text = dice.choice((*TEXTS, "0.001", "chunked", "https://evil.example"))
            lines.append(header.format(text.replace("\n", " ")))
    return "\r\n".join((*lines, "\r\n")).encode() + content


def fields_of(dice: random.Random) -> dict[str, Any]:
    """Some fields with odd values of any type."""
    fields: dict[str, Any] = {"prompt": "a star" if dice.random() < 0.8 else dice.choice(TEXTS)}
    chance = dice.choice((0.01, 0.03, 0.1))
    for name, field in FORM_FIELDS.items():
        if dice.random() > chance:
            continue
        odd: Any = dice.choice((*TEXTS, *WHOLE, None, True, [], {}, [{"id": "ink"}], [[]]))
        fitting: Any = {
            "integer": dice.choice(WHOLE) if dice.random() < 0.3 else dice.randrange(1, 9),
            "number": dice.choice(REAL),
            "boolean": dice.random() < 0.5,
            "array": [{"id": dice.choice(("ink", *TEXTS)), "scale": dice.choice(REAL)}],
            "string": dice.choice(field.choices or TEXTS),
        }[field.type]
        fields[name] = odd if dice.random() < 0.2 else fitting
    return fields


def json_of(dice: random.Random) -> bytes:
    """A body of JSON, or nearly: NaN and Infinity are not."""
    return json.dumps(fields_of(dice)).encode()


def form_of(dice: random.Random) -> tuple[str, bytes]:
    """A form's content type and body."""
    parts = []
    for name, value in fields_of(dice).items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append((name, "", text.encode("utf-8", "replace")))
    for name in ("image", "image[]", "mask", "prompt", "x"):
        if dice.random() < (0.9 if name == "image" else 0.05):
            data = plain() if dice.random() < 0.7 else dice.choice(FILES)
            parts.append((name, '; filename="a.png"', data))
    dice.shuffle(parts)
    content = b""
    for name, more, data in parts:
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        content += head.encode() + data + b"\r\n"
    return "multipart/form-data; boundary=b", content + b"--b--\r\n"


async def fuzz(there: Door, count: int, seed: int) -> Counter[str]:
    """Send the inputs and count them by status; raises for a status that is not allowed."""
    return await statuses_of(inputs(count, seed), partial(send, there), ALLOWED)


async def send(there: Door, data: bytes) -> str:
    """Return the status that an input ends with."""
    host, _, port = there.wire.server.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(60):
            writer.write(data)
            answer = await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    statuses = [each.decode() for each in STATUS.findall(answer)]
    return next((each for each in statuses if each != CONTINUE), CLOSED)


@asynccontextmanager
async def fuzzed() -> AsyncIterator[Door]:
    """A server whose model takes images, with enough room for all callers and little patience."""
    ink = AdapterOffer(id="ink", rank=4, bytes=500)
    with ExitStack() as stack:
        for module, name in (
            (body, "BODY_SECONDS"),
            (body, "LARGE_BODY_SECONDS"),
            (connection, "BODY_SECONDS"),
            (connection, "HEADER_SECONDS"),
            (http_server, "IDLE_SECONDS"),
        ):
            stack.enter_context(patch.object(module, name, SECONDS))
        for name in ("MAX_RECEIVING_LARGE", "MAX_RECEIVING_LARGE_PER_CALLER"):
            stack.enter_context(patch.object(body, name, AT_ONCE))
        async with door(
            fake={"auto": True, "models": [replace(fake_image_model(), adapters=(ink,))]},
            dispatch=Dispatch(max_queued_jobs=4 * AT_ONCE),
            results=Results(result_ttl=1.0),
        ) as there:
            yield there


async def run(count: int, seed: int) -> None:
    """Start a server, fuzz it, and print the counts."""
    async with fuzzed() as there:
        statuses = await fuzz(there, count, seed)
        assert (await there.generate()).status_code == 200
        assert there.wire.server.dispatcher.counts.live == 0
    for status, number in statuses.most_common():
        print(f"{number:9}  {status}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    configure_logs(Logs(log_level="warning"))
    asyncio.run(run(options.inputs, options.seed))
