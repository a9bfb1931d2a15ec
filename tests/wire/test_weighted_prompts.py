"""Weighted prompts from the command line, the Python client and buf, with the demo model."""

import base64
import subprocess
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from darkroom_client import Client, Image, InvalidRequest, PromptSyntax
from darkroom_client.cli import main

from .test_other_clients import PROMPT, SECONDS, buf_curl, check_png, tool

pytest.importorskip("compel", reason="needs darkroom-server[prompt-weights]")

WEIGHTS = PROMPT.replace("yellow", "(yellow:1.5)")
LONG = ". ".join([PROMPT, "a red ring on a white background"] * 3)
"""More than the 32 tokens that the demo model reads of a plain prompt."""

FIELDS: dict[str, Any] = {"steps": 4, "seed": 7, "exact": True}


def image_of(client: Client, prompt: str, syntax: str, **fields: Any) -> Image:
    return client.generate(prompt, prompt_syntax=syntax, **{**FIELDS, **fields}).image


def digest(image: Image) -> str:
    assert image.replay.pixels_sha256
    return image.replay.pixels_sha256


def test_the_model_takes_the_syntax_and_obeys_it(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        assert "prompt_syntax" in client.model().optional_fields
        plain = image_of(client, PROMPT, "plain")
        weighted = image_of(client, PROMPT, "weighted")
        heavy = image_of(client, WEIGHTS, "weighted")
    assert digest(weighted) == digest(plain)
    assert digest(heavy) != digest(plain)


def test_only_a_plain_prompt_is_cut(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        plain = [image_of(client, text, "plain") for text in (LONG, f"{LONG}. a black star")]
        weighted = [image_of(client, text, "weighted") for text in (LONG, f"{LONG}. a black star")]
    assert [image.prompt_truncated for image in (*plain, *weighted)] == [True, True, False, False]
    assert digest(plain[0]) == digest(plain[1])
    assert digest(weighted[0]) != digest(weighted[1])


def test_its_record_reproduces_an_image(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        image = image_of(client, WEIGHTS, "weighted", negative_prompt="(red:0.5) ring")
        record = image.replay
        assert record.request.prompt_syntax is PromptSyntax.WEIGHTED
        assert "compel" in record.library_versions
        assert "compel" not in image_of(client, PROMPT, "plain").replay.library_versions
        assert digest(client.replay(record).image) == digest(image)


@pytest.mark.parametrize(
    ("fields", "violation"),
    [
        ({"prompt": "a (red star"}, "character 3: '(' is not closed"),
        ({"prompt": "a star", "negative_prompt": "(a:3)"}, "character 3: weight 3 is not in 0"),
        ({"prompt": "star " * 241}, "needs more than 8 windows of 32 tokens"),
        # Only the engine counts its tokens.
        ({"prompt": "7" * 300}, "needs more than 8 windows of 32 tokens"),
        ({"prompt": "a star", "negative_prompt": "7" * 300}, "needs more than 8 windows"),
    ],
)
def test_what_cannot_be_encoded_whole_is_invalid(
    address: str, fields: dict[str, Any], violation: str
) -> None:
    with Client(address, timeout=SECONDS) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.generate(**FIELDS, **fields, prompt_syntax="weighted")
        (found,) = caught.value.violations
        assert found.field == list(fields)[-1]
        assert found.description.startswith(violation)
        assert client.generate(**FIELDS, **fields, prompt_syntax="plain").image.data


def test_the_command_line(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--seed", "7", "--steps", "4", "--exact", "--target", address]
    weighted = ["--prompt-syntax", "weighted"]
    assert main(["generate", WEIGHTS, "-o", "heavy", *options, *weighted]) == 0
    assert main(["generate", PROMPT, "-o", "even", *options, *weighted]) == 0
    assert main(["generate", PROMPT, "-o", "plain", *options]) == 0
    (heavy,), (even,), (plain,) = (
        list((tmp_path / folder).glob("*.png")) for folder in ("heavy", "even", "plain")
    )
    assert pixels(even) == pixels(plain)
    assert pixels(heavy) != pixels(plain)
    assert main(["replay", str(heavy), "--target", address]) == 0
    capsys.readouterr()
    assert main(["generate", "a (red star", *options, *weighted]) == 2
    assert "prompt: character 3: '(' is not closed" in capsys.readouterr().err


def pixels(file: Path) -> bytes:
    with PIL.Image.open(file) as picture:
        return picture.tobytes()


def test_buf(address: str, tmp_path: Path) -> None:
    request = {
        "prompt": WEIGHTS,
        "seed": "7",
        "steps": 4,
        "format": "IMAGE_FORMAT_PNG",
        "prompt_syntax": "PROMPT_SYNTAX_WEIGHTED",
    }
    (image,) = buf_curl(address, "GenerationService/Generate", request, tmp_path)["images"]
    assert image["replay"]["request"]["promptSyntax"] == "PROMPT_SYNTAX_WEIGHTED"
    check_png(base64.b64decode(image["data"]), image["width"])

    data = f'{{"prompt": "{"7" * 300}", "prompt_syntax": 2}}'
    command = [tool("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--data", data]
    command.append(f"http://{address}/darkroom.v1.GenerationService/Generate")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0
    assert "invalid_argument" in done.stderr
    assert "prompt: needs more than 8 windows of 32 tokens" in done.stderr
