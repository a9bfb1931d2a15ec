"""Clients without our Python code: by reflection alone, and from the .proto files in Node."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

PROJECT = Path(__file__).parents[2]
NODE_EXAMPLE = PROJECT / "examples" / "node"
PROMPT = "a large yellow star on a blue background"
SECONDS = 240


def tool(name: str) -> str:
    """The path of a program; fails the test if it is not installed."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is not installed"
    return path


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def buf_curl(address: str, method: str, request: dict[str, Any], cwd: Path) -> dict[str, Any]:
    command = [tool("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    command += ["--header", f"darkroom-max-reply-bytes: {64 * 2**20}"]
    command += ["--data", json.dumps(request), f"http://{address}/darkroom.v1.{method}"]
    reply: dict[str, Any] = json.loads(run(command, cwd))
    return reply


def check_png(data: bytes, size: int) -> None:
    with PIL.Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (size, size))


def test_buf_generates_an_image_by_reflection(address: str, tmp_path: Path) -> None:
    model = buf_curl(address, "ModelService/GetModel", {}, tmp_path)["model"]
    size = model["defaults"]["width"]
    request = {"prompt": PROMPT, "seed": "0", "steps": 4, "format": "IMAGE_FORMAT_PNG"}

    reply = buf_curl(address, "GenerationService/Generate", request, tmp_path)

    (image,) = reply["images"]
    assert (image["width"], image["height"]) == (size, size)
    assert image["replay"]["request"]["seed"] == "0"
    check_png(base64.b64decode(image["data"]), size)


def test_buf_gets_the_violation_of_a_field_that_the_model_does_not_take(
    address: str, tmp_path: Path
) -> None:
    model = buf_curl(address, "ModelService/GetModel", {}, tmp_path)["model"]
    assert "guidance_scale" in model["optionalFields"]
    assert model["guidance"]["scale"] == "guidance_scale"
    request = json.dumps({"prompt": PROMPT, "true_cfg_scale": 4, "prompt_syntax": 1})
    command = [tool("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    command += ["--data", request, f"http://{address}/darkroom.v1.GenerationService/Generate"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)

    assert done.returncode != 0
    assert "invalid_argument" in done.stderr
    assert "true_cfg_scale: model 'demo' does not take it" in done.stderr


def test_buf_lists_the_services_by_reflection(address: str, tmp_path: Path) -> None:
    command = [tool("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"]

    methods = run([*command, "--list-methods", f"http://{address}"], tmp_path).split()

    assert "darkroom.v1.GenerationService/Generate" in methods
    assert "grpc.health.v1.Health/Check" in methods


@pytest.fixture(scope="module")
def node_example() -> Path:
    """The example with its packages installed, as its lock file says."""
    if not (NODE_EXAMPLE / "node_modules" / "@grpc" / "grpc-js").exists():
        run([tool("npm"), "ci", "--no-audit", "--no-fund"], NODE_EXAMPLE)
    return NODE_EXAMPLE


@pytest.mark.needs("node")
def test_node_generates_an_image_from_the_proto_files(
    address: str, node_example: Path, tmp_path: Path
) -> None:
    path = tmp_path / "star.png"
    command = [tool("node"), str(node_example / "generate.js"), PROMPT, str(path), address]

    output = json.loads(run(command, tmp_path))

    assert (output["path"], output["seed"]) == (str(path), "7")
    check_png(path.read_bytes(), output["width"])


@pytest.mark.needs("node")
def test_node_shows_the_servers_error(address: str, node_example: Path, tmp_path: Path) -> None:
    program = [tool("node"), str(node_example / "generate.js")]

    done = subprocess.run(
        [*program, "star " * 5000, str(tmp_path / "star.png"), address],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )

    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: prompt")


def test_the_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (NODE_EXAMPLE / "package-lock.json").read_text()
