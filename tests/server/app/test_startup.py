import subprocess
import sys

import pytest
import structlog

from darkroom_server.backends.fake import FLAGGED
from darkroom_server.core.errors import StartupError
from darkroom_server.settings import Logs
from tests.server.app.process import start
from tests.server.wire import refusal, serving


def test_startup_logs_one_line_and_prints_nothing() -> None:
    with start() as server:
        line = server.until("serving")
    assert line["models"] == ["demo"]
    assert (line["device"], line["dtype"]) == ("cpu", "float32")
    assert (line["preset"], line["preset_why"]) == ("fast", "auto, on cpu")
    assert line["address"].startswith("127.0.0.1:")


def test_an_explicit_preset_is_logged_as_such() -> None:
    with start("--preset", "fast") as server:
        assert server.until("serving")["preset_why"] == "asked for"


async def test_an_engine_that_cannot_load_ends_serve() -> None:
    async with serving(wait=False, fake={"load": False}) as wire:
        wire.engine.die("no such folder", fatal=True)
        with pytest.raises(StartupError, match="no such folder"):
            await wire.serve


def test_the_serving_process_never_imports_torch() -> None:
    code = (
        "import sys, darkroom_server.app, darkroom_server.cli\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_each_request_logs_one_line_without_its_prompt() -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(fake={"auto": True}) as wire:
            await wire.generate(f"secret {FLAGGED}", request_id="mine")
            await refusal(wire.generate(prompt="secret", width=1))
            await refusal(wire.generate(prompt="secret", model="other"))
    lines = [line for line in logs if line["event"] == "request"]
    first, second, third = lines
    assert (first["model"], first["outcome"], first["images"]) == ("demo", "finished", 1)
    assert first["flagged"] == 1
    assert set(first["stages"]) == {
        "queue",
        "encode_prompt",
        "denoise",
        "decode",
        "encode_image",
    }
    assert (second["model"], second["outcome"]) == ("demo", "invalid")
    assert (third["model"], third["reason"]) == ("unknown", "UNKNOWN_MODEL")
    assert "secret" not in str(logs)


async def test_log_prompts_logs_prompts() -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(fake={"auto": True}, logs=Logs(log_prompts=True)) as wire:
            await wire.generate("a star")
            await refusal(wire.generate("a star", prompt_2="a moon", negative_prompt_2="rain"))
    first, second = [line for line in logs if line["event"] == "request"]
    assert first["prompt"] == "a star"
    assert "prompt_2" not in first
    assert (second["prompt_2"], second["negative_prompt_2"]) == ("a moon", "rain")
