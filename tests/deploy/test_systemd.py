"""The systemd unit is valid, and its time limits fit the server's; the server notifies systemd."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom_server.dispatch import State
from darkroom_server.service_manager import ServiceManager
from darkroom_server.settings import Shutdown
from tests.server.wire import serving

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "darkroom.service"
STOP_SECONDS = 15
"""What a shutdown takes besides the delay and the grace."""


def verify(unit: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.M)
    return str(value)


@pytest.mark.needs("systemd-analyze")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    # The program that it names must exist: here it is another one.
    program = shutil.which("true")
    text = UNIT.read_text().replace("/opt/darkroom/bin/darkroom-server", str(program))
    (tmp_path / UNIT.name).write_text(text)
    checked = verify(tmp_path / UNIT.name)
    assert (checked.returncode, checked.stderr) == (0, "")

    (tmp_path / UNIT.name).write_text(text.replace("WatchdogSec=30", "WatchdogSec=often"))
    assert "Failed to parse sec value" in verify(tmp_path / UNIT.name).stderr


def test_systemd_waits_for_a_drain() -> None:
    needed = Shutdown().drain_delay + Shutdown().grace + STOP_SECONDS
    assert float(setting("TimeoutStopSec")) >= needed
    assert setting("Type") == "notify"
    assert setting("RestartPreventExitStatus") == "2"


class Manager:
    """The socket of a service manager."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address)

    async def receive(self) -> list[str]:
        """The lines of the next message."""
        async with asyncio.timeout(30):
            message = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
        return message.decode().splitlines()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    name = f"{tmp_path}/notify" if request.param == "file" else f"@darkroom-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    manager = Manager(name.replace("@", "\0"))
    yield manager
    manager.close()


async def test_the_server_says_when_it_serves_and_when_it_stops(manager: Manager) -> None:
    async with serving(wait=False, fake={"load": False}) as wire:
        wire.engine.become_ready()
        assert await manager.receive() == ["READY=1", "STATUS=serving"]
    assert await manager.receive() == ["STOPPING=1", "STATUS=draining"]


async def test_a_server_that_loads_is_not_ready(manager: Manager) -> None:
    async with serving(wait=False, fake={"load": False}):
        pass
    assert (await manager.receive())[0] == "STOPPING=1"


async def test_signs_of_life_come_twice_in_the_watchdogs_time(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = ServiceManager()
    began = asyncio.get_running_loop().time()
    for _ in range(3):
        assert await manager.receive() == ["WATCHDOG=1"]
    # At once, and after one and two intervals of half the time.
    assert asyncio.get_running_loop().time() - began >= 0.04
    notifier.publish(State.READY)
    messages = [await manager.receive(), await manager.receive()]
    assert ["READY=1", "STATUS=serving"] in messages


async def test_the_watchdog_of_another_process_gets_none(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    notifier = ServiceManager()
    await asyncio.sleep(0)
    notifier.publish(State.READY)
    assert await manager.receive() == ["READY=1", "STATUS=serving"]
    notifier.publish(State.READY)  # Not again.
    notifier.publish(State.DRAINING)
    assert (await manager.receive())[0] == "STOPPING=1"


async def test_a_manager_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    async with serving(fake={"auto": True}) as wire:
        assert (await wire.generate()).images
