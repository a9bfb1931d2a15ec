"""Callers without a token are counted by their address."""

import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.dispatch import PeerAddresses
from darkroom_server.rpc.interceptors.receiving import peer_address
from darkroom_server.settings import Security
from tests.server.hostile.http2 import peer
from tests.server.wire import Wire, refusal, serving

ONE_JOB = Security(max_jobs_per_address=1)


@pytest.mark.parametrize(
    ("peer_name", "trusted", "forwarded", "expected"),
    [
        ("ipv4:10.0.0.1:80", None, "1.1.1.1", "10.0.0.1"),
        ("ipv4:10.0.0.1:80", "10.0.0.0/8", "1.1.1.1", "1.1.1.1"),
        ("ipv4:10.0.0.1:80", "10.0.0.0/8", "", "10.0.0.1"),
        ("ipv4:10.0.0.1:80", "10.0.0.0/8", "6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
        ("ipv4:10.0.0.1:80", "10.0.0.0/8", "6.6.6.6, nonsense", "10.0.0.1"),
        ("ipv4:10.0.0.1:80", "192.168.0.0/16,10.0.0.1", "[2001:db8::1]:99", "2001:db8::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:80", "10.0.0.0/8", "1.1.1.1:123", "1.1.1.1"),
        ("ipv6:[2001:db8:0:0:ab::1]:80", None, "", "2001:db8::/64"),
        ("ipv6:[::1]:80", None, "", "::1"),
        ("unix:", None, "1.1.1.1", "unix"),
    ],
)
def test_the_address(peer_name: str, trusted: str | None, forwarded: str, expected: str) -> None:
    metadata = [("x-forwarded-for", forwarded)] if forwarded else []
    assert peer_address(PeerAddresses(trusted), peer_name, metadata) == expected


async def begin_at(wire: Wire, source: str) -> None:
    """Begin a job from another address, and wait until the engine has it."""
    generation = generation_pb2.GenerateRequest(prompt="a star", request_id=source)
    data = generation_pb2.SubmitGenerationRequest(generation=generation).SerializeToString()
    async with peer(wire.server.address, source=source) as other:
        stream = other.open("darkroom.v1.GenerationService/SubmitGeneration", data=data)
        await other.ended(stream)


async def test_jobs_are_counted_by_address_and_found_by_everybody() -> None:
    async with serving(security=ONE_JOB) as wire:
        await begin_at(wire, "127.0.0.2")
        first = wire.generating()
        await wire.becomes(lambda: wire.server.dispatcher.running_jobs == 2)
        error = await refusal(wire.generate())
        assert error.info.reason == "QUOTA_EXCEEDED"
        request = generation_pb2.CancelGenerationRequest(request_id="127.0.0.2")
        assert (await wire.generation.CancelGeneration(request)).cancelled
        wire.engine.advance(4)
        assert (await first).images
        again = wire.generating()  # Its place is free.
        await wire.becomes(lambda: wire.server.dispatcher.running_jobs == 1)
        wire.engine.advance(4)
        assert (await again).images


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_proxy_names_callers_only_if_it_is_trusted(trusted: bool) -> None:
    security = Security(max_jobs_per_address=1, trusted_proxies="127.0.0.0/8" if trusted else None)
    request = generation_pb2.GenerateRequest(prompt="a star")
    async with serving(security=security) as wire:
        first = wire.generation.Generate(request, metadata=(("x-forwarded-for", "1.1.1.1"),))
        await wire.submitted.get()
        second = wire.generation.Generate(request, metadata=(("x-forwarded-for", "2.2.2.2"),))
        if not trusted:
            assert (await refusal(second)).info.reason == "QUOTA_EXCEEDED"
        else:
            await wire.submitted.get()
        wire.engine.advance(4)
        assert (await first).images
