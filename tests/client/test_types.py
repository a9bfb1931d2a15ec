"""Type checks of code that uses the client."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RIGHT = """\
from datetime import datetime
from typing import assert_never, assert_type

from darkroom_client import (
    Accepted, AsyncClient, Client, DarkroomError, Event, Finished, GenerationRequest,
    GenerationResult, Image, ImageReady, Job, Model, ModelState, Preview, Progress, Queued,
    Reconnecting, Restarted, Started,
)


def shown(event: Event) -> str:
    match event:
        case Accepted(seeds=seeds):
            return str(seeds[0] + 1)
        case Queued(position=position):
            return str(position + 1)
        case Started() | Restarted() | Reconnecting():
            return ""
        case Progress(step=step, steps=steps):
            return f"{step / steps:.0%}"
        case Preview(data=data) | ImageReady(image=data):
            return str(data)
        case Finished(result=result):
            return result.model
    assert_never(event)


def use(client: Client) -> None:
    assert_type(client.generate("a star", steps=20, scheduler="euler"), GenerationResult)
    client.generate(GenerationRequest("a star", steps=20), seed=0)
    client.generate_many(["a star"], steps=20)
    assert_type(client.result("r-1", 5).image, Image)
    for job in client.jobs():
        assert_type(job, Job)
    with client.stream("a star", preview_every=2) as stream:
        for event in stream:
            shown(event)
        assert_type(stream.result(), GenerationResult)
    assert_type(client.load_model("sdxl", timeout=None), Model)
    assert_type(client.unload_model("sdxl"), int)
    for model in (client.pin_model("sdxl"), client.pin_model("sdxl", pinned=False)):
        assert_type(model.state, ModelState)
        assert_type(model.last_used, datetime | None)
    for index, answer in client.generate_as_completed(["a star"]):
        assert_type(index, int)
        assert_type(answer, GenerationResult | DarkroomError)


async def use_async(client: AsyncClient) -> None:
    assert_type(await client.generate("a star"), GenerationResult)
    async with client.stream("a star") as stream:
        async for event in stream:
            assert_type(event, Event)
        assert_type(await stream.result(), GenerationResult)
    assert_type(await client.cancel("r-1"), bool)
    assert_type(await client.load_model("sdxl"), Model)
    assert_type(await client.unload_model("sdxl"), int)
    assert_type(await client.pin_model("sdxl"), Model)
    async for job in client.jobs():
        assert_type(job, Job)
"""

WRONG = """\
from darkroom_client import AsyncClient, Client, GenerationRequest


async def use(client: Client, other: AsyncClient) -> None:
    client.generate("a star", step=20)  # no such argument
    client.generate("a star", steps="20")  # not a number
    client.generate()  # no prompt
    client.generate("a star", None, 20)  # options have names
    client.generate("a star").picture  # image
    for event in client.stream("a star"):
        event.step  # not every event has one
    other.generate("a star").images  # not awaited
    with other.stream("a star"):  # async with
        pass
    request = GenerationRequest(prompt="a star")
    request.seed = 7  # frozen
    client.submit("a star", time_limit="soon")  # not a number
    client.generate_many(["a star"], step=20)  # no such argument
    GenerationRequest("a star", "demo")  # options have names
    client.load_model()  # no name
    client.pin_model("sdxl", False)  # pinned has a name
    client.unload_model("sdxl").ready  # a number
    other.load_model("sdxl").ready  # not awaited
"""


def check(tool: tuple[str, ...], *snippets: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *tool, *map(str, snippets)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("tool", [("mypy", "--strict"), ("basedpyright", "--level", "error")])
def test_type_checkers_accept_right_calls_and_reject_wrong_ones(
    tmp_path: Path, tool: tuple[str, ...]
) -> None:
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(RIGHT)
    wrong.write_text(WRONG)

    said = check(tool, right, wrong)

    assert "right.py" not in said, said
    for number, line in enumerate(WRONG.splitlines(), 1):
        if "#" in line:
            assert f"wrong.py:{number}:" in said, f"{line}\n{said}"
