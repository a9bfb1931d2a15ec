"""Servers of one model with different ``--lora``: a job runs where its adapter is."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.model import ModelInfo
from darkroom_server.settings import Dispatch
from tests.server.fleet.conftest import POLL_SECONDS, Servers
from tests.server.fleet.test_models import claims
from tests.server.rpc.test_jobs import name, state_of
from tests.server.streams import kind, rest, submit, watch
from tests.server.wire import Wire, refusal

pytestmark = pytest.mark.needs("postgresql")

OUTLINE = [generation_pb2.Lora(id="outline", scale=1.0)]


def with_loras(*ids: str) -> ModelInfo:
    """What a server has with these ``--lora``."""
    offers = tuple(AdapterOffer(id=id, rank=4, bytes=500) for id in ids)
    return replace(fake_image_model(), adapters=offers)


async def start(servers: Servers, name: str, *loras: str, **fake: Any) -> Wire:
    """A server with room for one job."""
    return await servers.start(
        name,
        dispatch=Dispatch(max_resident_samples=1),
        fake={"models": [with_loras(*loras)], **fake},
    )


async def has_looked(wire: Wire) -> None:
    """Wait until a server has looked for jobs a few times from now on."""
    before = await claims(wire)
    while await claims(wire) < before + 3:
        await asyncio.sleep(POLL_SECONDS)


async def test_a_queued_job_is_claimed_only_by_a_server_with_its_adapter(servers: Servers) -> None:
    a = await start(servers, "a", "outline", "sketch")
    b = await start(servers, "b", "sketch")
    await submit(a, request_id="runs", steps=5)
    await submit(b, request_id="other", steps=5)
    await servers.becomes(lambda states: states == {"runs": 1, "other": 1})
    await submit(a, request_id="waits", loras=OUTLINE, steps=5)
    sketch = [generation_pb2.Lora(id="sketch", scale=1.0)]
    await submit(a, request_id="anywhere", loras=sketch, steps=5)
    await servers.becomes(lambda states: (states["waits"], states["anywhere"]) == (0, 0))
    await b.submitted.get()
    b.engine.advance(5)
    # It takes the one behind it.
    assert (await b.submitted.get()).request_id == "anywhere"
    b.engine.advance(5)
    await has_looked(b)
    assert (await servers.states())["waits"] == 0
    await a.submitted.get()
    a.engine.advance(5)
    assert (await a.submitted.get()).request_id == "waits"
    assert b.submitted.empty()
    # Its callers may follow it at the server that cannot run it.
    a.engine.advance(5)
    assert kind((await rest(watch(b, "waits")))[-1]) == "finished"


async def test_a_job_whose_adapter_no_living_server_has_ends(servers: Servers) -> None:
    a, b = await start(servers, "a", "outline"), await start(servers, "b", "sketch")
    await submit(a, request_id="job", loras=OUTLINE, steps=5)
    await servers.becomes(lambda states: states == {"job": 1})
    a.server.stop()
    await a.server.shutdown()
    await has_looked(b)
    assert name((await state_of(b, "job")).state) == "QUEUED"
    await servers.sql("UPDATE jobs SET queued_at = queued_at - 61")
    await servers.becomes(lambda states: states == {"job": 3})
    error = await refusal(rest(watch(b, "job")))
    assert (error.code, error.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_GONE")
    assert "none has its model with what it asks for, such as its adapters" in error.message
    assert b.submitted.empty()


async def test_images_that_are_gone_are_made_again_where_their_adapter_is(servers: Servers) -> None:
    a = await start(servers, "a", "outline", auto=True)
    b = await start(servers, "b", "sketch")
    await submit(a, request_id="job", loras=OUTLINE, steps=5)
    await servers.becomes(lambda states: states == {"job": 2})
    a.server.stop()
    await a.server.shutdown()
    call = watch(b, "job")
    await servers.becomes(lambda states: states == {"job": 0})
    c = await start(servers, "c", "outline", auto=True)
    assert kind((await rest(call))[-1]) == "finished"
    assert (await c.submitted.get()).request_id == "job"
    assert b.submitted.empty()
