"""OpenAI's own clients, unchanged, on a real server: base_url and key alone are set."""

import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from darkroom_client import Client
from tests.wire.conftest import READY_SECONDS

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "a large yellow star on a blue background"
REQUEST: dict[str, Any] = {"model": "demo", "prompt": PROMPT}
OURS: dict[str, Any] = {"seed": 3, "steps": 6}


@pytest.fixture(scope="module")
def client(http_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http_url}/v1", api_key="unused")


@pytest.fixture(scope="module")
def expected(address: str) -> bytes:
    """The image of ``REQUEST`` over gRPC."""
    with Client(address, insecure=True) as ours:
        return ours.generate(PROMPT, model="demo", **OURS).images[0].data


def test_generate(client: openai.OpenAI, expected: bytes) -> None:
    images = client.images.generate(**REQUEST, extra_body=OURS)
    assert images.data is not None
    assert base64.b64decode(images.data[0].b64_json or "") == expected
    assert images.usage is not None
    assert images.usage.total_tokens == 64
    other = client.images.generate(**REQUEST, extra_body={**OURS, "seed": 4})
    assert other.data is not None
    assert base64.b64decode(other.data[0].b64_json or "") != expected


def test_the_snippet_of_the_documentation(http_url: str) -> None:
    page = (EXAMPLES.parent / "docs" / "http.md").read_text("utf-8")
    snippet = page.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(snippet.replace("http://127.0.0.1:8000", http_url), found)
    assert base64.b64decode(found["images"].data[0].b64_json)[:4] == b"\x89PNG"


def test_urls(client: openai.OpenAI, expected: bytes) -> None:
    images = client.images.generate(**REQUEST, response_format="url", extra_body=OURS)
    assert images.data is not None
    with urllib.request.urlopen(images.data[0].url or "") as page:
        assert page.headers["content-type"] == "image/png"
        assert page.read() == expected


def test_stream(client: openai.OpenAI, expected: bytes) -> None:
    stream = client.images.generate(**REQUEST, stream=True, partial_images=2, extra_body=OURS)
    *partial, last = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    previews = [base64.b64decode(event.b64_json) for event in partial]
    assert all(preview[:2] == b"\xff\xd8" for preview in previews)
    assert previews[0] != previews[1]
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == expected
    assert last.usage.total_tokens == 64


async def test_the_asynchronous_client(http_url: str, expected: bytes) -> None:
    async with openai.AsyncOpenAI(base_url=f"{http_url}/v1", api_key="unused") as client:
        images = await client.images.generate(**REQUEST, extra_body=OURS)
        assert images.data is not None
        assert base64.b64decode(images.data[0].b64_json or "") == expected
        stream = await client.images.generate(**REQUEST, stream=True, extra_body=OURS)
        (event,) = [event async for event in stream]
        assert base64.b64decode(event.b64_json) == expected


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**REQUEST, size="13x13", extra_body={"mood": "vivid"})
    assert caught.value.param == "mood"
    violations: Any = caught.value.body
    assert {each["field"] for each in violations["violations"]} == {"mood", "size"}
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.InternalServerError) as late:
        client.images.generate(**REQUEST, extra_headers={"X-Request-Timeout": "0.001"})
    assert late.value.status_code == 504


def send(http_url: str, path: str, body: bytes, kind: str) -> Any:
    """The answer to a request that no client library made."""
    headers = {"Content-Type": kind, "Authorization": "Bearer sk-anything"}
    request = urllib.request.Request(f"{http_url}/v1/images/{path}", body, headers)
    with urllib.request.urlopen(request) as page:
        return json.load(page)


@pytest.mark.parametrize(
    "fields",
    [
        # Open WebUI, whose address may end with ?api-version=….
        {"n": 1, "size": "128x128", "response_format": "b64_json"},
        # Clients that send what they do not set.
        {"n": None, "user": None, "background": "auto", "moderation": "auto"},
    ],
)
def test_call_shapes_of_other_programs(http_url: str, fields: dict[str, Any]) -> None:
    body = json.dumps({**REQUEST, **fields, "steps": 1}).encode()
    answer = send(http_url, "generations?api-version=2024-02-01", body, "application/json")
    (image,) = answer["data"]
    assert base64.b64decode(image["b64_json"])[:4] == b"\x89PNG"
    assert not image.get("url")  # Open WebUI prefers it.


def test_the_form_of_open_webui(http_url: str, expected: bytes) -> None:
    """Each text has a type of its own, and there is no strength."""
    part = '--x\r\nContent-Type: {}\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    fields = {**REQUEST, "n": "1", "size": "128x128", "response_format": "b64_json"}
    texts = [
        part.format("text/plain; charset=utf-8", name, "") + f"{value}\r\n"
        for name, value in fields.items()
    ]
    file = part.format("image/png", "image", '; filename="a.png"')
    body = "".join([*texts, file]).encode() + expected + b"\r\n--x--\r\n"
    answer = send(http_url, "edits", body, "multipart/form-data; boundary=x")
    (image,) = answer["data"]
    assert image["record"]["request"]["image"]
    assert base64.b64decode(image["b64_json"])[:4] == b"\x89PNG"


def test_langchain_in_javascript(client: openai.OpenAI, expected: bytes) -> None:
    """Its wrapper sends every field, and reads URLs."""
    images = client.images.generate(
        **REQUEST,
        n=1,
        size="128x128",
        response_format="url",
        style="vivid",
        quality="standard",
        extra_body=OURS,
    )
    assert images.data is not None
    with urllib.request.urlopen(images.data[0].url or "") as page:
        assert page.read() == expected


def environment(http_url: str) -> dict[str, str]:
    return {**os.environ, "DARKROOM_HTTP": http_url}


def test_the_python_example(http_url: str, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, EXAMPLES / "openai_images.py"],
        cwd=tmp_path,
        check=True,
        timeout=READY_SECONDS,
        env=environment(http_url),
    )
    saved = sorted(path.name for path in tmp_path.iterdir())
    assert saved == ["circle.png", "preview-0.jpg", "preview-1.jpg", "red-star.png", "star.png"]
    assert (tmp_path / "red-star.png").read_bytes() != (tmp_path / "star.png").read_bytes()


@pytest.mark.needs("node")
def test_the_node_example(http_url: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node
    picture, edited = tmp_path / "star.png", tmp_path / "edited.png"
    done = subprocess.run(
        [node, EXAMPLES / "node" / "openai.js", PROMPT, picture, edited],
        capture_output=True,
        text=True,
        check=False,
        timeout=READY_SECONDS,
        env=environment(http_url),
    )
    assert done.returncode == 0, done.stderr
    *previews, last = done.stdout.splitlines()
    assert previews == ["preview 0", "preview 1"]
    assert json.loads(last)["seed"] == 7
    assert picture.read_bytes()[:4] == edited.read_bytes()[:4] == b"\x89PNG"
    assert picture.read_bytes() != edited.read_bytes()
