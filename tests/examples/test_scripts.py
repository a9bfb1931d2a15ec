"""Runs the example programs as a reader would, against the fake server."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from darkroom_client import (
    Adapter,
    AdapterKind,
    Client,
    Control,
    ModelDoesNotFit,
    ModelLoad,
    ModelState,
    RowLimitSource,
    UploadedImage,
)
from darkroom_client.testing import Behaviour, FakeServer, JobState, fake_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 120


def environment(server: FakeServer) -> dict[str, str]:
    return {**os.environ, "DARKROOM_TARGET": server.target}


@pytest.mark.parametrize(
    ("script", "pictures"), [("quickstart.py", ["star.png"]), ("async_many.py", None)]
)
def test_python(
    darkroom_server: FakeServer, tmp_path: Path, script: str, pictures: list[str] | None
) -> None:
    # The examples use the default address; run a copy with the fake server's address.
    code = (EXAMPLES / script).read_text().replace("127.0.0.1:50051", darkroom_server.target)
    (tmp_path / script).write_text(code)

    subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        check=True,
        timeout=SECONDS,
        env=environment(darkroom_server),
    )

    saved = sorted(path.name for path in tmp_path.glob("*.png"))
    assert saved == pictures if pictures else len(saved) == len(darkroom_server.jobs)


def node(script: str, server: FakeServer, *arguments: str | Path) -> "subprocess.Popen[str]":
    program = shutil.which("node")
    assert program, "node is not installed"
    return subprocess.Popen(
        [program, EXAMPLES / "node" / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(server),
    )


@pytest.mark.needs("node")
@pytest.mark.parametrize("script", ["generate.js", "stream.js"])
def test_node(darkroom_server: FakeServer, tmp_path: Path, script: str) -> None:
    picture = tmp_path / "star.png"

    with node(script, darkroom_server, "a star", picture) as running:
        out, errors = running.communicate(timeout=SECONDS)

    assert running.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["seed"] == "7"
    assert picture.read_bytes().startswith(b"\x89PNG")
    if script == "stream.js":
        assert "step 4 of 4" in out


@pytest.mark.needs("node")
@pytest.mark.parametrize("takes", [("true_cfg_scale", "negative_prompt"), ("guidance_scale",)])
def test_node_sets_what_the_model_takes(tmp_path: Path, takes: tuple[str, ...]) -> None:
    with FakeServer(models=[fake_model("one", optional_fields=takes)]) as server:
        with node("generate.js", server, "a star", tmp_path / "star.png") as running:
            _, errors = running.communicate(timeout=SECONDS)
        (request,) = server.requests
    assert running.returncode == 0, errors
    expected = (4.0, "blurry") if "true_cfg_scale" in takes else (None, "")
    assert (request.true_cfg_scale, request.negative_prompt) == expected


@pytest.mark.needs("node")
def test_node_uploads_an_image(tmp_path: Path) -> None:
    data = b"\x89PNG\r\n\x1a\n" + bytes(1_300_000)  # Three chunks; the fake server does not decode.
    (tmp_path / "photo.png").write_bytes(data)
    model = fake_model(optional_fields=("image", "strength"))
    with FakeServer(models=[model]) as server:
        arguments = ("a star", tmp_path / "photo.png", tmp_path / "star.png")
        with node("image.js", server, *arguments) as running:
            _, errors = running.communicate(timeout=SECONDS)
        assert running.returncode == 0, errors
        (request,) = server.requests
        assert server.uploads == (data,)
        assert (tmp_path / "star.png").read_bytes().startswith(b"\x89PNG")
    assert request.strength == 0.6


@pytest.mark.needs("node")
@pytest.mark.parametrize(
    ("flags", "takes"),
    [("--edit", "reference_images"), ("--control edges --scale 0.8", "controls")],
)
def test_node_edits_an_image_and_sends_a_control(tmp_path: Path, flags: str, takes: str) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")  # The fake server does not decode.
    files = (tmp_path / "photo.png", tmp_path / "star.png")
    arguments: list[str | Path] = [*flags.split(), "a star", *files]
    edges = Adapter(id="edges", kind=AdapterKind.CONTROLNET, models=("demo",))
    model = fake_model("demo", optional_fields=(takes,))
    other = fake_model("demo", optional_fields=("image", "strength"))
    with (
        FakeServer(models=[model], adapters=[edges]) as server,
        FakeServer(models=[other], adapters=[edges]) as rejecting,
    ):
        with node("image.js", server, *arguments) as running:
            _, errors = running.communicate(timeout=SECONDS)
        assert running.returncode == 0, errors
        (request,) = server.requests
        with node("image.js", rejecting, *arguments) as running:
            _, errors = running.communicate(timeout=SECONDS)
    assert (running.returncode, errors[:17]) == (1, "INVALID_ARGUMENT:")
    assert takes in errors
    assert (tmp_path / "star.png").read_bytes().startswith(b"\x89PNG")
    digest = hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest()
    photo = UploadedImage(f"sha256:{digest}")
    edited = takes == "reference_images"
    assert request.image is None
    assert request.reference_images == ((photo,) if edited else ())
    assert request.controls == (() if edited else (Control("edges", photo, scale=0.8),))


@pytest.mark.needs("node")
def test_node_lists_jobs(darkroom_server: FakeServer) -> None:
    darkroom_server.script(Behaviour(), Behaviour(queue=1, hold=threading.Event()))
    with Client(darkroom_server.target) as client:
        done, waits = [client.submit("a star", steps=4).request_id for _ in range(2)]
        client.result(done)
        darkroom_server.wait_for(lambda: darkroom_server.jobs[1].generation().queue_position == 1)

        with node("jobs.js", darkroom_server) as running:
            out, errors = running.communicate(timeout=SECONDS)

        with node("jobs.js", darkroom_server, done) as running_one:
            one, _ = running_one.communicate(timeout=SECONDS)

    assert running.returncode == 0, errors
    assert out.splitlines() == [
        f"{waits}: queued, step 0 of 4, 1 ahead",
        f"{done}: finished, step 4 of 4",
    ]
    assert one.splitlines() == [f"{done}: finished, step 4 of 4"]


@pytest.mark.needs("node")
def test_node_reports_a_job_that_is_not_known(darkroom_server: FakeServer) -> None:
    with node("jobs.js", darkroom_server, "nobody") as running:
        out, errors = running.communicate(timeout=SECONDS)

    assert (running.returncode, out) == (1, "")
    assert errors.startswith("NOT_FOUND: ")


@pytest.mark.needs("node")
def test_node_shows_the_status() -> None:
    measured = fake_model("measured")
    assert measured.limits is not None
    assert measured.runtime is not None
    measured = replace(
        measured,
        limits=replace(measured.limits, max_rows=32, row_limit_source=RowLimitSource.CORRECTED),
        runtime=replace(
            measured.runtime,
            dtype="bfloat16",
            vae_channels_last=True,
            format_rule="the CPU has amx",
            denoiser="compiled",
            quantization="int8",
        ),
    )
    broken = fake_model("broken", state=ModelState.FAILED, state_reason="its vae is missing")
    with (
        FakeServer(models=[fake_model(), measured, broken]) as server,
        node("status.js", server) as running,
    ):
        out, errors = running.communicate(timeout=SECONDS)

    assert running.returncode == 0, errors
    state, *models, engine = out.splitlines()
    assert ": ready; jobs: 0 running, 0 of " in state
    assert models == [
        "model demo: float32 contiguous, preset fast on fake, eager denoiser",
        "  rows of a batch: 8 at most (set)",
        "  resident, 1073741824 bytes of weights, last used: never",
        "model measured: bfloat16 contiguous (VAE channels_last) (the CPU has amx), preset fast "
        "on fake, compiled denoiser",
        "  weights in int8, offload: none",
        "  rows of a batch: 32 at most (corrected)",
        "  resident, 1073741824 bytes of weights, last used: never",
        "model broken: failed: its vae is missing",
    ]
    assert engine == "engine 0 on fake: ready, 0 images, 0 restarts"


@pytest.mark.needs("node")
def test_interrupting_node_cancels(darkroom_server: FakeServer, tmp_path: Path) -> None:
    darkroom_server.script(Behaviour(hold=threading.Event()))

    with node("stream.js", darkroom_server, "a star", tmp_path / "star.png") as running:
        darkroom_server.wait_for(lambda: len(darkroom_server.jobs) == 1, SECONDS)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=SECONDS)

    assert "CANCELLED" in errors
    darkroom_server.wait_for(lambda: darkroom_server.jobs[0].state is JobState.CANCELLED)


@pytest.mark.needs("node")
def test_node_lists_the_adapters() -> None:
    adapters = [
        Adapter(id="outline", models=("demo",), rank=8, resident=True),
        Adapter(id="edges", kind=AdapterKind.CONTROLNET, models=("demo",), resident=True),
        Adapter(id="huge", models=("demo",), rank=512, rejection="its rank is 512"),
    ]
    with FakeServer(adapters=adapters) as server, node("adapters.js", server) as running:
        out, errors = running.communicate(timeout=SECONDS)

    assert running.returncode == 0, errors
    assert out.splitlines() == [
        "edges: ControlNet, for demo; in memory",
        "huge: LoRA of rank 512, for demo; its rank is 512",
        "outline: LoRA of rank 8, for demo; in memory",
    ]


@pytest.mark.needs("node")
def test_node_adds_and_removes_an_adapter() -> None:
    neon = Adapter(id="neon", models=("demo",), rank=4)
    printed = []
    with FakeServer(addable_adapters=[neon]) as server:
        for verb in ("add", "remove", "remove"):
            with node("adapters.js", server, server.target, verb, "neon") as running:
                printed.append(running.communicate(timeout=SECONDS))

    assert printed == [
        ("neon: LoRA of rank 4, for demo; on disk\n", ""),
        ("neon: removed; unfinished jobs that use it: 0\n", ""),
        ("", "NOT_FOUND: no adapter 'neon'; this server has none\n"),
    ]


@pytest.mark.needs("node")
def test_node_lists_the_models() -> None:
    used = datetime(2026, 10, 4, 12, 30, 15, tzinfo=UTC)
    fetched = ModelLoad(fetched_bytes=3 * 2**30, fetch_bytes=2**32)
    models = [
        replace(fake_model("demo"), last_used=used, pinned=True),
        fake_model("anime", state=ModelState.AVAILABLE),
        replace(fake_model("sdxl", state=ModelState.LOADING), weight_bytes=0, load=fetched),
        fake_model("broken", state=ModelState.FAILED, state_reason="no vae"),
    ]
    with FakeServer(models=models) as server, node("models.js", server) as running:
        out, errors = running.communicate(timeout=SECONDS)

    assert running.returncode == 0, errors
    assert out.splitlines() == [
        "demo: resident, pinned, 1.00 GiB, last used 2026-10-04T12:30:15.000Z",
        "anime: available, 1.00 GiB",
        "sdxl: loading (75 % fetched)",
        "broken: failed (no vae), 1.00 GiB",
    ]


@pytest.mark.needs("node")
def test_node_loads_pins_and_unloads_a_model() -> None:
    models = [fake_model(name, state=ModelState.AVAILABLE) for name in ("anime", "huge")]
    errors = {"huge": ModelDoesNotFit("it needs 9 GiB")}
    calls = ["load anime", "pin anime", "unpin anime", "unload anime", "load huge", "pin none"]
    printed = []
    with FakeServer(models=models, load_errors=errors) as server:
        for call in calls:
            with node("models.js", server, server.target, *call.split()) as running:
                printed.append(running.communicate(timeout=SECONDS))
        with Client(server.target) as client:
            assert {model.state for model in client.models()} == {ModelState.AVAILABLE}

    assert printed == [
        ("anime: resident, 1.00 GiB\n", ""),
        ("anime: resident, pinned, 1.00 GiB\n", ""),
        ("anime: resident, 1.00 GiB\n", ""),
        ("anime: unloaded; unfinished jobs that use it: 0\n", ""),
        ("", "FAILED_PRECONDITION: no memory for model 'huge': it needs 9 GiB\n"),
        ("", "NOT_FOUND: no model 'none'; this server holds anime, huge\n"),
    ]
