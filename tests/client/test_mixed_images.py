"""A result whose images come from two servers that run the model differently says so."""

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from darkroom_client import AsyncClient, Client, GenerationResult
from darkroom_client.cli import main
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model import ModelInfo
from darkroom_server.settings import Network, Shutdown
from tests.server.wire import serving

MIXED = {"dtype": ("float32", "bfloat16"), "channels_last": ("false", "true")}
BY = "were not all generated in the same way"


def other_format() -> ModelInfo:
    model = fake_model()
    runtime = dataclasses.replace(model.runtime, dtype="bfloat16", channels_last=True)
    return dataclasses.replace(model, runtime=runtime)


async def over_a_restart(generate: Callable[[str], Awaitable[Any]], second: ModelInfo) -> Any:
    """What ``generate`` returns for two images, of which one comes from a server of ``second``."""
    async with serving(shutdown=Shutdown(grace=0.0)) as wire:
        address = wire.server.address
        running = asyncio.ensure_future(generate(address))
        job = await wire.submitted.get()
        wire.engine.deliver(job.id, 0)
    network = Network(port=int(address.rpartition(":")[2]), metrics_port=0)
    async with serving(fake={"models": [second], "auto": True}, network=network):
        return await running


def blocking(address: str) -> Awaitable[GenerationResult]:
    def generate() -> GenerationResult:
        with Client(address) as client:
            return client.stream("a star", seed=7, image_count=2).result()

    return asyncio.to_thread(generate)


async def asynchronous(address: str) -> GenerationResult:
    async with AsyncClient(address) as client:
        return await client.stream("a star", seed=7, image_count=2).result()


CLIENTS = pytest.mark.parametrize("generate", [blocking, asynchronous])


@CLIENTS
async def test_a_mixed_result_says_in_what(
    generate: Callable[[str], Awaitable[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    result = await over_a_restart(generate, other_format())
    assert [image.seed for image in result.images] == [7, 8]
    assert result.mixed == MIXED
    (warning,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert warning.name == "darkroom_client"
    assert warning.getMessage().endswith(
        f"{BY}: dtype float32, bfloat16; channels_last false, true"
    )
    assert result.request_id in warning.getMessage()


@CLIENTS
async def test_a_result_of_two_equal_servers_is_not_mixed(
    generate: Callable[[str], Awaitable[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    result = await over_a_restart(generate, fake_model())
    assert [image.seed for image in result.images] == [7, 8]
    assert result.mixed == {}
    assert BY not in caplog.text


@pytest.mark.parametrize("second", [other_format(), fake_model()], ids=["mixed", "equal"])
async def test_the_command_line_says_it(tmp_path: Path, second: ModelInfo) -> None:
    out, err = io.StringIO(), io.StringIO()

    def run(address: str) -> Awaitable[int]:
        options = ["--count", "2", "--seed", "7", "-o", str(tmp_path), "--json"]
        return asyncio.to_thread(main, ["generate", "--target", address, "a star", *options])

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = await over_a_restart(run, second)
    lines = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith('{"path')]
    assert (code, len(lines)) == (0, 2)
    mixed = second != fake_model()
    expected = {name: list(values) for name, values in MIXED.items()} if mixed else {}
    assert [line["mixed"] for line in lines] == [expected, expected]
    assert err.getvalue().count(BY) == (1 if mixed else 0)


def test_the_engines_of_a_server_are_not_different(client: Any) -> None:
    image = client.generate("a star", seed=1).image
    moved = [
        dataclasses.replace(image, replay=dataclasses.replace(image.replay, device=device))
        for device in ("cuda:0", "cuda:1", "cpu")
    ]
    result = client.generate("a star", seed=1)
    assert dataclasses.replace(result, images=tuple(moved[:2])).mixed == {}
    assert dataclasses.replace(result, images=tuple(moved[1:])).mixed == {"device": ("cuda", "cpu")}


def test_a_library_that_only_one_server_has_differs(client: Any) -> None:
    image = client.generate("a star", seed=1).image
    versions: list[dict[str, str]] = [{"torch": "2.13.0"}, {"torch": "2.13.0", "xformers": "1.0"}]
    images = tuple(
        dataclasses.replace(
            image, replay=dataclasses.replace(image.replay, library_versions=version)
        )
        for version in versions
    )
    mixed = dataclasses.replace(client.generate("a star"), images=images).mixed
    assert mixed == {"library_versions.xformers": ("-", "1.0")}
