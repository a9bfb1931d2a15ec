"""Many callers of a real server with failures: every call ends, with a result or its error."""

import signal
from collections import Counter
from itertools import cycle

import pytest

from darkroom_client import Client, DarkroomError, DeadlineExceeded, Overloaded, Unavailable
from tests.client.storm import CALLERS, BreakableProxy, Call, Disruption, RealServer, storm

TIMEOUT = 60.0
SLACK = 30.0
"""For a busy machine."""

EACH = 6


def check(calls: list[Call], *, errors: tuple[type[DarkroomError], ...]) -> Counter[str]:
    """Check what must hold in any case: a result or a typed error, in time."""
    assert len(calls) == CALLERS * EACH
    for call in calls:
        assert call.seconds < TIMEOUT + SLACK
        if call.generated:
            assert [image.seed for image in call.outcome.images] == [call.seed]  # type: ignore[union-attr]
            assert all(image.data for image in call.outcome.images)  # type: ignore[union-attr]
        elif call.outcome is not None:
            assert isinstance(call.outcome, errors), repr(call.outcome)
            assert call.outcome.request_id
        else:
            assert call.kind == "leave"
    return Counter(type(call.outcome).__name__ for call in calls)


@pytest.mark.parametrize("style", ["sync", "async"])
def test_broken_connections_and_a_full_queue(style: str) -> None:
    with RealServer("--max-queued-jobs", "8") as server, BreakableProxy(server.port) as proxy:
        with Disruption(proxy.cut, pause=0.4, most=20) as disruption:
            calls = storm(style, f"127.0.0.1:{proxy.port}", EACH, TIMEOUT)
        with Client(server.target) as client:
            client.wait_until_ready(TIMEOUT)

    outcomes = check(calls, errors=(Overloaded, Unavailable))
    assert disruption.times
    assert outcomes["GenerationResult"] > 0
    # A lost connection never starts a second job.
    assert max(server.started.values()) == 1
    assert {call.seed for call in calls if call.generated} <= set(server.started)
    # An accepted job is not lost with the connection.
    assert not [c for c in calls if c.accepted and isinstance(c.outcome, DarkroomError)]


@pytest.mark.parametrize("style", ["sync", "async"])
def test_restarts_by_drain_and_by_kill(style: str) -> None:
    signals = cycle([signal.SIGTERM, signal.SIGKILL])
    with RealServer(pass_seconds=0.05) as server:

        def restart() -> None:
            server.stop(next(signals))
            server.start()
            # Killing a server before it is ready again would test nothing.
            with Client(server.target) as waiter:
                waiter.wait_until_ready(120)

        with Disruption(restart, pause=0.5, most=2) as disruption:
            calls = storm(style, server.target, EACH, TIMEOUT)
        with Client(server.target) as client:
            client.wait_until_ready(120)
            assert client.generate("a star").images

    outcomes = check(calls, errors=(Overloaded, Unavailable, DeadlineExceeded))
    assert disruption.times
    assert outcomes["GenerationResult"] > 0
    failed = [c for c in calls if c.accepted and isinstance(c.outcome, DarkroomError)]
    assert all(isinstance(call.outcome, DeadlineExceeded) for call in failed)
