"""Servers stand still between their turns."""

from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from bench.peers.process import PeerProcess
from bench.peers.protocols import Wire
from bench.peers.registry import Peer
from bench.peers.servers.config import ServerConfig
from bench.peers.standing import StandingServers
from tests.bench.test_peers import RUNTIME

PEER = Peer(
    "health", "(h) Health", "health_server", ".venv", Wire.TRITON, (), package="tests.bench"
)
CONFIG = ServerConfig(
    folder="", runtime=RUNTIME, port=0, trace="", max_batch_images=8, batch_timeout=0.01
)


@pytest.fixture
def servers() -> Iterator[StandingServers]:
    servers = StandingServers()
    yield servers
    servers.close()


def tree_of(process: PeerProcess) -> list[psutil.Process]:
    main = psutil.Process(process.pid)
    return [main, *main.children(recursive=True)]


def test_a_server_stands_still_between_its_turns(servers: StandingServers) -> None:
    with servers.serving(PEER, CONFIG) as process:
        tree = tree_of(process)
        assert len(tree) == 2
        assert process.is_new
        assert psutil.STATUS_STOPPED not in {each.status() for each in tree}
    assert {each.status() for each in tree} == {psutil.STATUS_STOPPED}
    with servers.serving(PEER, CONFIG) as again:
        assert again is process
        assert not again.is_new
        assert psutil.STATUS_STOPPED not in {each.status() for each in tree}
    servers.close()
    assert not any(each.is_running() for each in tree)


def test_another_configuration_is_another_server(servers: StandingServers) -> None:
    with servers.serving(PEER, CONFIG) as process:
        tree = tree_of(process)
    with servers.serving(PEER, replace(CONFIG, batch_timeout=0.05)) as other:
        assert other.is_new
        assert not any(each.is_running() for each in tree)


def test_a_server_whose_turn_failed_ends(servers: StandingServers) -> None:
    turn = servers.serving(PEER, CONFIG)
    tree = tree_of(turn.__enter__())
    assert not turn.__exit__(RuntimeError, RuntimeError("lost"), None)
    assert not any(each.is_running() for each in tree)
    with servers.serving(PEER, CONFIG) as new:
        assert new.is_new


def test_a_server_that_died_while_it_stood_still_is_reported(servers: StandingServers) -> None:
    with servers.serving(PEER, CONFIG) as process:
        tree = tree_of(process)
    for each in tree:
        each.kill()
    with (
        pytest.raises(RuntimeError, match=r"\(h\) Health is not ready"),
        servers.serving(PEER, CONFIG),
    ):
        pass
    with servers.serving(PEER, CONFIG) as new:
        assert new.is_new
