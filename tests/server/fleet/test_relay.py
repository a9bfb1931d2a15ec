"""Calls that go on to another server: over TLS, for callers with tokens, and from HTTP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import NotReady
from darkroom_server.core.ledger import Key
from darkroom_server.dispatch import ActiveJob
from darkroom_server.rpc import event_stream
from darkroom_server.rpc.interceptors.call_context import GENERATION
from darkroom_server.settings import Http, Security
from tests.server.fleet.conftest import Servers
from tests.server.http.door import token_file
from tests.server.rpc.test_idempotency import cancel
from tests.server.rpc.test_jobs import name, state_of
from tests.server.security.certificates import Authority
from tests.server.streams import assembled, kind, rest, submit, watch
from tests.server.wire import Wire, refusal

pytestmark = pytest.mark.needs("postgresql")

AUTO = {"auto": True}

NEWER = b"\xc2\x3e\x05newer"
"""A field that no message has yet."""


def authority(folder: Path) -> Authority:
    folder.mkdir()
    return Authority(folder)


def secured(folder: Path, authority: Authority, name: str, **more: Any) -> Security:
    """A server's own certificate, for a name that is not its address."""
    cert, key = authority.issue(f"{name}.example", "127.0.0.1", to=name)
    return Security(tls_cert=str(cert), tls_key=str(key), **more)


@pytest.mark.parametrize("mutual", [False, True])
async def test_servers_reach_each_other_over_tls(
    servers: Servers, tmp_path: Path, mutual: bool
) -> None:
    ours = authority(tmp_path / "ours")
    more: dict[str, Any] = {"tls_client_ca": str(ours.file)} if mutual else {}
    channel = ours.channel(ours.issue("caller", to="caller"))
    a, b = [
        await servers.start(each, security=secured(tmp_path, ours, each, **more), channel=channel)
        for each in "ab"
    ]
    if mutual:
        with pytest.raises(grpc.aio.AioRpcError):
            async with ours.channel()(b.server.address) as stranger:
                await replace(b, channel=stranger).generate()
    await submit(b, request_id="job", steps=1000)
    await submit(b, request_id="short", steps=4)
    await servers.becomes(lambda states: states == {"job": 1, "short": 1})
    assert name((await state_of(a, "job")).state) == "RUNNING"
    assert await cancel(a, "job")
    b.engine.advance(4)
    responses = await rest(watch(a, "short"))
    assert kind(responses[-1]) == "finished"
    assert assembled([r.event.image for r in responses if kind(r) == "image"])
    # Only the certificate in the ledger is trusted.
    fleet = a.server._fleet
    assert fleet
    theirs, _ = authority(tmp_path / "theirs").issue("b.example")
    (entry,) = [each for each in await fleet.member._ledger.servers() if each.name == "b"]
    assert entry.certificate
    another = replace(entry, id=-1, certificate=b"b.example\n" + theirs.read_bytes())
    with pytest.raises(NotReady):
        await fleet.member._peers.generation(another, Key("anonymous", "short"))


async def test_a_caller_with_a_token_is_the_same_caller_at_the_other_server(
    servers: Servers, tmp_path: Path
) -> None:
    ours = authority(tmp_path / "ours")
    tokens = token_file(tmp_path, "alice", "bob")
    a, b = [
        await servers.start(
            each,
            security=secured(tmp_path, ours, each, tokens=tokens),
            channel=ours.channel(),
            fake=AUTO,
        )
        for each in "ab"
    ]
    alice, bob = ((("authorization", f"Bearer {who}-secret"),) for who in ("alice", "bob"))
    request = generation_pb2.SubmitGenerationRequest(
        generation=generation_pb2.GenerateRequest(prompt="a star", request_id="job")
    )
    await b.generation.SubmitGeneration(request, metadata=alice)
    watching = generation_pb2.WatchGenerationRequest(request_id="job")
    responses = await rest(a.generation.WatchGeneration(watching, metadata=alice))
    assert kind(responses[-1]) == "finished"
    error = await refusal(rest(a.generation.WatchGeneration(watching, metadata=bob)))
    assert error.code is grpc.StatusCode.NOT_FOUND


async def test_a_record_says_how_the_server_that_ran_the_job_decodes(servers: Servers) -> None:
    here = fake_model()
    there = replace(here, runtime=replace(here.runtime, vae_channels_last=True))
    a = await servers.start("a")
    b = await servers.start("b", fake={"models": [there], **AUTO})
    await submit(b, request_id="job", steps=4)
    responses = await rest(watch(a, "job"))
    chunks = [r.event.image for r in responses if kind(r) == "image"]
    assert chunks[0].image.replay.vae_channels_last
    assert not chunks[0].image.replay.channels_last


async def test_pictures_pass_as_the_bytes_of_the_server_that_made_them(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for response in (generation_pb2.GenerateStreamResponse, generation_pb2.WatchGenerationResponse):
        (field,) = response.DESCRIPTOR.fields
        assert (field.name, field.number) == ("event", 1)
        assert field.message_type is generation_pb2.GenerationEvent.DESCRIPTOR
    make = event_stream._image_chunk

    def newer(active: ActiveJob, index: int, number: int) -> Any:
        made = make(active, index, number)
        if not isinstance(made, bytes):
            made.image.MergeFromString(NEWER)
        return made

    monkeypatch.setattr(event_stream, "CHUNK_BYTES", 40)
    monkeypatch.setattr(event_stream, "_image_chunk", newer)
    a, b = await servers.start("a", fake=AUTO), await servers.start("b")
    fields: Any = {"request_id": "job", "image_count": 2, "seed": 7}
    await submit(a, **fields)
    await servers.becomes(lambda states: states == {"job": 2})
    keep = generation_pb2.ON_DISCONNECT_KEEP
    join = generation_pb2.GenerateRequest(prompt="a star", on_disconnect=keep, **fields)
    calls = {
        "WatchGeneration": generation_pb2.WatchGenerationRequest(request_id="job"),
        "GenerateStream": generation_pb2.GenerateStreamRequest(generation=join),
    }

    async def sent(wire: Wire, method: str) -> list[bytes]:
        """The messages with images."""
        call: Any = wire.channel.unary_stream(
            f"/{GENERATION}/{method}", request_serializer=type(calls[method]).SerializeToString
        )
        return [each async for each in call(calls[method]) if NEWER in each]

    own = await sent(a, "WatchGeneration")
    assert len(own) > 4
    for method in calls:
        assert await sent(b, method) == own
    # Who gets one message has the images from those.
    reply = await b.generation.Generate(join)
    chunks = [generation_pb2.WatchGenerationResponse.FromString(each).event.image for each in own]
    assert [image.data for image in reply.images] == list(assembled(chunks).values())
    assert NEWER not in reply.SerializeToString()


async def test_a_result_is_fetched_over_http_from_any_server(
    servers: Servers, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    http = Http(http_port=0, http_url_key=str(key))
    a, b = [await servers.start(each, http=http, fake=AUTO) for each in "ab"]
    body = {"prompt": "a star", "response_format": "url", "keep": True, "seed": 3}
    async with httpx2.AsyncClient(timeout=60) as client:
        first, second = (f"http://{wire.server.http_address}" for wire in (a, b))
        headers = {"Idempotency-Key": "job"}
        reply = await client.post(f"{first}/v1/images/generations", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        url = reply.json()["data"][0]["url"]
        expected = (await client.get(url)).content
        assert expected
        elsewhere = url.replace(first, second)
        assert elsewhere != url
        assert (await client.get(elsewhere)).content == expected
        assert (await client.get(elsewhere.replace("/job/", "/other/"))).status_code == 404
        # The same request joins at the other server.
        again = await client.post(f"{second}/v1/images/generations", json=body, headers=headers)
        (joined,) = again.json()["data"]
        assert joined["url"].startswith(second)
        assert (await client.get(joined["url"])).content == expected
