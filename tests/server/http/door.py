"""A complete server with the HTTP door on a free port, and a plain client for it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from darkroom_server.settings import Http
from tests.server.security.test_tokens import entry
from tests.server.wire import Wire, serving


@dataclass
class Door:
    """A running server, and an HTTP client of it."""

    wire: Wire
    client: httpx2.AsyncClient

    @property
    def url(self) -> str:
        return f"http://{self.wire.server.http_address}"

    async def generate(self, prompt: Any = "a star", **fields: Any) -> httpx2.Response:
        headers = fields.pop("headers", {})
        body = {"prompt": prompt, **fields}
        return await self.client.post("/v1/images/generations", json=body, headers=headers)

    def generating(self, prompt: Any = "a star", **fields: Any) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.generate(prompt, **fields))


@asynccontextmanager
async def door(*, http: dict[str, Any] | None = None, **more: Any) -> AsyncIterator[Door]:
    """As ``serving``, with an HTTP port; ``http`` are its settings."""
    settings = Http(**{"http_port": 0, **(http or {})})
    async with serving(http=settings, **more) as wire:
        url = f"http://{wire.server.http_address}"
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            yield Door(wire, client)


def token_file(folder: Path, *callers: str, admins: tuple[str, ...] = ()) -> str:
    """A token file; the token of each caller is as in ``bearer``."""
    path = folder / "tokens.toml"
    entries = [entry(name, f"{name}-secret") for name in callers]
    entries += [entry(name, f"{name}-secret", "admin = true") for name in admins]
    path.write_text("".join(entries))
    return str(path)


def bearer(caller: str) -> dict[str, str]:
    return {"authorization": f"Bearer {caller}-secret"}


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events in ``text``: names and data."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events
