"""Closing, waiting, and the process and event loop of a client."""

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from darkroom_client import AsyncClient, Cancelled, Client, Unauthenticated, Unavailable
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer, held


def test_calls_of_a_closed_client_are_errors(client: Any) -> None:
    client.close()
    client.close()

    for call in (client.models, client.model, client.wait_until_ready):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("a star")
    with pytest.raises(RuntimeError, match="closed"):
        client.generate_many(["a star"])


def test_the_blocking_client_is_a_context_manager(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        assert client.generate("a star").images
        assert repr(client) == f"Client('{server.address}')"
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("a star")


async def test_the_async_client_is_a_context_manager(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        assert (await client.generate("a star")).images
        assert repr(client) == f"AsyncClient('{server.address}')"
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("a star")


def test_close_cancels_a_running_call(server: ScriptedServer) -> None:
    released, arrived = threading.Event(), threading.Event()
    server.script.append(notifying(arrived, released))
    client = Client(server.address)

    def close_once_arrived() -> None:
        arrived.wait(60)
        client.close()

    closer = threading.Thread(target=close_once_arrived)
    closer.start()

    with pytest.raises(Cancelled):
        client.generate("a star")

    closer.join()
    released.set()


async def test_close_cancels_a_running_async_call(server: ScriptedServer) -> None:
    released, arrived = threading.Event(), threading.Event()
    server.script.append(notifying(arrived, released))
    client = AsyncClient(server.address)
    call = asyncio.ensure_future(client.generate("a star", request_id="r-1"))
    await asyncio.to_thread(arrived.wait, 60)

    await client.close()

    with pytest.raises(Cancelled) as caught:
        await call
    assert caught.value.request_id == "r-1"
    released.set()


async def test_a_cancelled_task_raises_cancelled_error(server: ScriptedServer) -> None:
    released, arrived = threading.Event(), threading.Event()
    server.script.append(notifying(arrived, released))
    async with AsyncClient(server.address) as client:
        call = asyncio.ensure_future(client.generate("a star"))
        await asyncio.to_thread(arrived.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    released.set()


def notifying(arrived: threading.Event, released: threading.Event) -> Any:
    behave = held(released)

    def answer(request: Any, context: Any) -> Any:
        arrived.set()
        return behave(request, context)

    return answer


def test_an_async_client_belongs_to_one_loop(server: ScriptedServer) -> None:
    client = AsyncClient(server.address)
    with asyncio.Runner() as first:
        first.run(client.models())
        with asyncio.Runner() as second, pytest.raises(RuntimeError, match="event loop"):
            second.run(client.models())
        first.run(client.close())


FORKING = """
import os, sys
from darkroom_client import Client

def in_a_child(act):
    child = os.fork()
    if child == 0:
        try:
            act()
        except RuntimeError as error:
            print(error, flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

client = Client(sys.argv[1], timeout=30)
in_a_child(lambda: print(len(client.models()), "model", flush=True))
client.models()
in_a_child(client.models)
in_a_child(client.close)
print(len(client.models()), "model")
"""


def test_a_client_in_use_belongs_to_its_process(server: ScriptedServer) -> None:
    forking = subprocess.run(
        [sys.executable, "-c", FORKING, server.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert forking.stdout.splitlines() == [
        "1 model",
        "this client was in use before the process forked: make one in each process",
        "1 model",
    ], forking.stderr


def test_waiting_ends_when_the_server_is_ready(client: Any, server: ScriptedServer) -> None:
    server.ready = False
    timer = threading.Timer(0.2, lambda: setattr(server, "ready", True))
    timer.start()

    client.wait_until_ready(timeout=30)

    assert server.ready
    timer.join()


def test_waiting_can_start_before_the_server(connect: Connect) -> None:
    with ScriptedServer() as earlier:
        port = int(earlier.address.rpartition(":")[2])
    client = connect(earlier.address)
    late: list[ScriptedServer] = []
    timer = threading.Timer(0.3, lambda: late.append(ScriptedServer(port=port).__enter__()))
    timer.start()

    client.wait_until_ready(timeout=30)

    timer.join()
    late[0].__exit__(None, None, None)


def test_the_error_of_a_wait_names_the_address(connect: Connect) -> None:
    with ScriptedServer() as gone:
        pass

    with pytest.raises(Unavailable, match=r"after 0\.3 s") as caught:
        connect(gone.address).wait_until_ready(timeout=0.3)

    assert gone.address in str(caught.value)


def test_the_error_of_a_wait_for_a_loading_model_says_so(
    client: Any, server: ScriptedServer
) -> None:
    server.ready = False

    with pytest.raises(Unavailable, match="answers, and is still not ready"):
        client.wait_until_ready(timeout=1.0)


def test_waiting_raises_an_unauthenticated_error(connect: Connect, server: ScriptedServer) -> None:
    server.refuse_health = True

    with pytest.raises(Unauthenticated):
        connect(server.address).wait_until_ready(timeout=30)
