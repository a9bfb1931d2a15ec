"""What a caller asks for arrives, without a loop of its own: large batches, quotas, restarts."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from darkroom_client import AsyncClient, Client, GenerationResult
from darkroom_server.security.new_token import create_token
from darkroom_server.settings import Dispatch, Security
from tests.server.app.process import CLEAN, MAIN
from tests.server.telemetry.scrape import values
from tests.server.wire import Wire, serving

PASS_SECONDS = 0.01
STEPS = 40


async def cli(*arguments: str) -> None:
    """Run ``darkroom generate``, which must exit with 0."""
    command = [sys.executable, "-m", "darkroom_client.cli", "generate", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


def check(answers: list[Any], prompts: list[str]) -> None:
    assert all(isinstance(answer, GenerationResult) for answer in answers)
    assert [answer.image.replay.request.prompt for answer in answers] == prompts


async def test_300_prompts_at_a_time(tmp_path: Path) -> None:
    """Many more than the server accepts at a time."""
    prompts = [f"a star {number}" for number in range(300)]
    room = Dispatch(max_queued_jobs=16, max_resident_samples=16)
    async with serving(dispatch=room) as wire:
        async with AsyncClient(wire.server.address) as client:
            batch = client.generate_many(prompts, concurrency=300)
            check(await past_a_full_queue(wire, batch), prompts)
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(prompts))
        flags = ["--file", str(file), "--concurrency", "300", "--no-picture", "-o", str(tmp_path)]
        await past_a_full_queue(wire, cli("--target", wire.server.address, *flags))
    assert len(list(tmp_path.glob("*.png"))) == 300


async def past_a_full_queue(wire: Wire, batch: Coroutine[Any, Any, Any]) -> Any:
    """Run ``batch``; the engine takes no step until the server has rejected one of its jobs."""
    before = await refusals(wire)
    running = asyncio.ensure_future(batch)
    while await refusals(wire) == before:
        assert not running.done()
    while not running.done():
        wire.engine.advance()
        await asyncio.sleep(PASS_SECONDS)
    return await running


async def refusals(wire: Wire) -> float:
    counted = await values(wire, "darkroom_request_seconds_count", "outcome")
    return counted.get(("refused",), 0.0)


async def test_ten_prompts_under_a_token_of_two_jobs(tmp_path: Path) -> None:
    token, lines = token_and_lines("web")
    file = tmp_path / "tokens.toml"
    file.write_text(f"{lines}max_jobs = 2\n")
    prompts = [f"a star {number}" for number in range(10)]
    security = Security(tokens=str(file))
    async with serving(fake={"pass_seconds": PASS_SECONDS}, security=security) as wire:
        target = wire.server.address
        async with AsyncClient(target, token=token, insecure=True) as client:
            check(await client.generate_many(prompts, concurrency=10), prompts)
        check(await asyncio.to_thread(blocking_batch, target, token, prompts), prompts)
        assert await refusals(wire) > 0


def token_and_lines(name: str) -> tuple[str, str]:
    text = create_token(name)
    token = next(line for line in text.splitlines() if line.startswith("darkroom_"))
    return token, text[text.index("[[token]]") :].rstrip() + "\n"


def blocking_batch(target: str, token: str, prompts: list[str]) -> list[Any]:
    with Client(target, token=token, insecure=True) as client:
        return list(client.generate_many(prompts, concurrency=10))


@asynccontextmanager
async def process(port: int) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """A server that gives its jobs no time to finish when it stops."""
    engine = json.dumps({"pass_seconds": PASS_SECONDS})
    flags = ["--port", str(port), "--log-level", "error", "--grace", "0"]
    running = subprocess.Popen([sys.executable, "-c", MAIN, engine, *flags], env=CLEAN)
    try:
        yield running
    finally:
        running.kill()
        await asyncio.to_thread(running.wait)


def blocking(target: str) -> Any:
    with Client(target) as client:
        return client.generate("a star", steps=STEPS, seed=7).image


async def generate(client: AsyncClient) -> Any:
    return (await client.generate("a star", steps=STEPS, seed=7)).image


async def stream(client: AsyncClient) -> Any:
    return (await client.stream("a star", steps=STEPS, seed=7).result()).image


async def many(client: AsyncClient) -> Any:
    (answer,) = await client.generate_many(["a star"], steps=STEPS, seed=7)
    assert isinstance(answer, GenerationResult)
    return answer.image


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_server_is_restarted_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    target = f"127.0.0.1:{port}"
    verbs: list[Callable[[AsyncClient], Awaitable[Any]]] = [generate, stream, many]
    async with AsyncClient(target) as client:
        async with process(port) as first:
            await client.wait_until_ready(60)
            calls = [asyncio.ensure_future(verb(client)) for verb in verbs]
            calls.append(asyncio.ensure_future(asyncio.to_thread(blocking, target)))
            output = ("--no-picture", "-o", str(tmp_path), "--seed", "7", "--steps", str(STEPS))
            command = asyncio.ensure_future(cli("--target", target, "a star", *output))
            await all_run(client, len(calls))
            first.send_signal(number)
            await asyncio.to_thread(first.wait)
            assert not any(call.done() for call in calls)
        async with process(port):
            images = await asyncio.gather(*calls)
            await command
    assert {image.seed for image in images} == {7}
    assert len({image.data for image in images}) == 1
    assert len(list(tmp_path.glob("*.png"))) == 1


async def all_run(client: AsyncClient, count: int) -> None:
    """Wait until ``count`` jobs have begun, and none has ended."""
    async with asyncio.timeout(60):
        while True:
            steps = [job.step async for job in client.jobs()]
            assert STEPS not in steps, "the jobs are too short for this machine"
            if sum(step > 0 for step in steps) >= count:
                return
