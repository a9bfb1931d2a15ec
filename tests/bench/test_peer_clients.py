"""The peers' clients against small servers: how they send requests for several images."""

import asyncio
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from bench.peers.protocols import CLIENTS, Ended, Wire
from bench.workload.arrivals import Outcome
from bench.workload.requests import Request

THREE = Request(7, "a star", steps=30, guidance_scale=7.5, seed=5, images=3)


class Server(ThreadingHTTPServer):
    """Generates the text of the seed as the file of an image; seed 6 fails if ``broken``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.broken = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.broken and body["seed"] == 6:
            self._send(b"full", status=503)
        elif "inputs" in body:
            (rows,) = body["inputs"]
            files = [str(json.loads(row)["seed"]).encode() for row in rows["data"]]
            tensor = b"".join(struct.pack("<I", len(file)) + file for file in files)
            self._send(b"{head}" + tensor, head=len(b"{head}"))
        else:
            self._send(str(body["seed"]).encode())

    def _send(self, content: bytes, *, status: int = 200, head: int = 0) -> None:
        self.send_response(status)
        self.send_header("Inference-Header-Content-Length", str(head))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def files_of(wire: Wire, server: Server, request: Request) -> list[bytes]:
    async def generate() -> list[bytes]:
        client = CLIENTS[wire](server.server_port)
        try:
            return await client.generate(request, "test", None)
        finally:
            await client.close()

    return asyncio.run(generate())


def test_http_sends_a_request_for_each_image() -> None:
    with serving() as server:
        assert files_of(Wire.LITSERVE, server, THREE) == [b"5", b"6", b"7"]
        assert sorted(body["seed"] for body in server.bodies) == [5, 6, 7]
        assert {body["steps"] for body in server.bodies} == {30}


def test_one_image_that_fails_ends_the_request() -> None:
    with serving() as server:
        server.broken = True
        with pytest.raises(Ended) as ended:
            files_of(Wire.RAY, server, THREE)
        assert ended.value.outcome is Outcome.REJECTED


def test_triton_gets_a_row_for_each_image() -> None:
    with serving() as server:
        assert files_of(Wire.TRITON, server, THREE) == [b"5", b"6", b"7"]
        (body,) = server.bodies
        (rows,) = body["inputs"]
        assert rows["shape"] == [3, 1]
