"""Models from a hub: revisions, variants, tokens, and what the operator reads if it fails."""

import queue
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import huggingface_hub
import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file

from darkroom.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.engine.catalogue import fetching
from darkroom_server.engine.catalogue.fetching import fetch_reported
from darkroom_server.engine.loading import pipeline
from darkroom_server.engine.loading.revision import revision_of
from tests.server.app.process import CLEAN, ServerProcess

from .folders import TEXT, UNET, VAE, edited
from .hub import MEMBER, STRANGER, Hub, Repository, running_hub, silent_hub, unreachable_hub
from .test_loading import line_of, load

MODEL = "owner/gated"
KEY = "conv_in.weight"


def add_variant(folder: Path) -> None:
    """Add half-precision files, as variant ``fp16``, whose weights are a quarter of the others."""
    for name in (UNET, VAE, TEXT):
        file = folder / name
        weights = {key: (weight / 4).half() for key, weight in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


def halve_weights(folder: Path) -> None:
    """Put half-precision weights, which are half of the others, in the place of the full ones."""
    for name in (UNET, VAE, TEXT):
        file = folder / name
        weights = {key: (weight / 2).half() for key, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def repositories(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Repository]:
    folder = tmp_path_factory.mktemp("repositories")
    branches = {
        "main": edited(tiny_folder, folder / "main", add_variant),
        "fp16": edited(tiny_folder, folder / "fp16", halve_weights),
    }
    return {
        MODEL: Repository(branches, gated=True),
        "owner/open": Repository({"main": branches["main"]}),
        "owner/weights": Repository({"main": branches["main"] / "unet"}),
    }


@pytest.fixture
def hub(
    repositories: dict[str, Repository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """The hub that this process sees, and an empty cache.

    Logs are captured, because structlog takes most of a second to print a hub's traceback.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub(repositories) as hub, structlog.testing.capture_logs():
        see(hub.url, monkeypatch)
        yield hub


def see(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``huggingface_hub`` ask ``url``, which HF_ENDPOINT names in a new process."""
    constants = huggingface_hub.constants
    template = url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)


def tokens(hub: Hub, repository: str) -> set[str]:
    """The tokens of the calls for ``repository``."""
    return {token for _, path, token in hub.calls if f"/{repository}" in path}


def first_weights(pipeline: Any) -> torch.Tensor:
    weights: torch.Tensor = pipeline.unet.state_dict()[KEY]
    return weights


@pytest.mark.parametrize(
    ("revision", "variant", "factor"), [(None, None, 1), ("fp16", None, 2), (None, "fp16", 4)]
)
def test_a_branch_and_a_variant(
    revision: str | None, variant: str | None, factor: int, hub: Hub, tiny_folder: Path
) -> None:
    pipeline = load(MODEL, token=MEMBER, revision=revision, variant=variant)
    wanted = load_file(tiny_folder / UNET)[KEY] / factor
    if factor > 1:
        wanted = wanted.half().float()
    assert torch.equal(first_weights(pipeline), wanted)
    files = [UNET, VAE, TEXT]
    if variant:
        files = [file.replace(".safetensors", ".fp16.safetensors") for file in files]
    assert hub.downloads() == sorted(files)
    source = ModelSource(id="model", location=MODEL, revision=revision)
    commits = {b: hub.repositories[MODEL].commit(b) for b in ("main", "fp16")}
    assert revision_of(source, pipeline) == commits[revision or "main"]
    assert commits["main"] != commits["fp16"]
    assert tokens(hub, MODEL) == {MEMBER}


def test_a_commit(hub: Hub, tiny_folder: Path) -> None:
    commit = hub.repositories[MODEL].commit("fp16")
    pipeline = load(MODEL, token=MEMBER, revision=commit)
    assert torch.equal(
        first_weights(pipeline), (load_file(tiny_folder / UNET)[KEY] / 2).half().float()
    )


def test_an_open_model_needs_no_token(hub: Hub) -> None:
    load("owner/open")
    assert tokens(hub, "owner/open") == {""}


DEFAULT = "check its name, HF_TOKEN and the network, or give a folder"
GATED = (
    "access to it is restricted); accept its licence on the hub, and set HF_TOKEN to a token of "
    "that account"
)
UNKNOWN = "there is no such model, or it is private); check its name and HF_TOKEN, or give a folder"
INVALID = "the hub does not accept the token); check HF_TOKEN"

REJECTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gated, no token": (MODEL, {}, GATED),
    "gated, another account's token": (MODEL, {"token": STRANGER}, GATED),
    "gated, a wrong token": (MODEL, {"token": "hf_wrong"}, INVALID),
    "open, a wrong token": ("owner/open", {"token": "hf_wrong"}, INVALID),
    "unknown, no token": ("owner/none", {}, UNKNOWN),
    "unknown, a token": ("owner/none", {"token": MEMBER}, UNKNOWN),
    "unknown branch": (
        "owner/open",
        {"revision": "fp16"},
        "it has no revision 'fp16'); check the branch, tag or commit after @",
    ),
    "unknown commit": ("owner/open", {"revision": "0" * 40}, f"it has no revision '{'0' * 40}');"),
    "unknown variant": (
        "owner/open",
        {"variant": "bf16"},
        "it has no weights of variant 'bf16'); leave --variant out",
    ),
    "no pipeline": (
        "owner/weights",
        {},
        "it has no model_index.json); give a pipeline, as diffusers saves it",
    ),
}


@pytest.mark.parametrize("rejected", REJECTED)
def test_what_the_hub_does_not_provide(rejected: str, hub: Hub) -> None:
    location, fields, words = REJECTED[rejected]
    line = line_of(location, **fields)
    assert line.startswith(f"model {location!r} is not cached, and the hub does not provide it (")
    assert words in line, line
    assert hub.calls, "the hub was asked"
    assert hub.downloads() == []


def test_a_hub_that_refuses_connections(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    see(unreachable_hub(), monkeypatch)
    assert line_of("owner/open").endswith(DEFAULT)
    assert hub.calls == []


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is bounded, whether there is an earlier download or not."""
    monkeypatch.setattr(pipeline, "HUB_TIMEOUT", 0.2)
    load("owner/open")
    with silent_hub() as url:
        see(url, monkeypatch)
        with structlog.testing.capture_logs() as lines:
            load("owner/open")
        assert [line["event"] for line in lines if "hub" in line] == ["the hub's cache is used"]
        assert line_of("owner/other").endswith(DEFAULT)


@pytest.mark.parametrize("revision", [None, "fp16"])
@pytest.mark.parametrize("reason", ["no hub", "no token"])
def test_an_earlier_download(
    reason: str, revision: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(MODEL, token=MEMBER, revision=revision)
    downloads = hub.downloads()
    token = MEMBER
    if reason == "no hub":
        see(unreachable_hub(), monkeypatch)
    else:
        token = "hf_expired"
    with structlog.testing.capture_logs() as lines:
        again = load(MODEL, token=token, revision=revision)
    assert [line["event"] for line in lines if "hub" in line] == ["the hub's cache is used"]
    assert torch.equal(first_weights(again), first_weights(first))
    assert hub.downloads() == downloads
    other = "fp16" if revision is None else None
    assert "is not cached" in line_of(MODEL, token=token, revision=other)


def test_an_incomplete_download_is_not_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load("owner/open")
    for file in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("diffusion_pytorch_model*"):
        file.unlink()
    see(unreachable_hub(), monkeypatch)
    assert "is not cached" in line_of("owner/open")


def test_what_is_cached_is_not_downloaded_again(hub: Hub) -> None:
    load("owner/open")
    before = hub.downloads("")
    load("owner/open")
    assert hub.downloads("") == before


def size_of_weights(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


def test_a_download_reports_how_far_it_is(
    hub: Hub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "REPORT_SECONDS", 0.01)
    source = ModelSource(id="net", location="owner/open", may_download=True)
    reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
    hub.hold(UNET)
    done = size_of_weights(tiny_folder, VAE, TEXT)
    with structlog.testing.capture_logs() as logs, fetch_reported(source, reports.put):
        loading = threading.Thread(target=load, args=["owner/open"])
        loading.start()
        report = reports.get(timeout=60)
        while report.fetched_bytes < done:
            report = reports.get(timeout=60)
        assert report.model == "net"
        assert report.fetch_bytes == done + size_of_weights(tiny_folder, UNET)
        assert report.fetched_bytes < report.fetch_bytes
        hub.released.set()
        while report.fetched_bytes < report.fetch_bytes:
            report = reports.get(timeout=60)
        loading.join()
    (line,) = [entry for entry in logs if entry["event"] == "model is being fetched"]
    assert (line["model"], line["of"]) == ("net", report.fetch_bytes)
    # What is here already is not fetched, and nothing is reported.
    later: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with fetch_reported(source, later.put):
        load("owner/open")
    assert later.empty()


def test_a_model_is_fetched_when_it_is_asked_for(
    hub: Hub, tiny_folder: Path, tmp_path: Path
) -> None:
    """Its progress is in the log, in its state and over the wire."""
    hub.hold(UNET)
    flags = ["--model", "net=owner/open", "--on-demand", "--allow-download", "--preset", "fast"]
    with ExitStack() as stack:
        process = stack.enter_context(serve(hub, tmp_path / "cache", MEMBER, flags))
        stack.callback(process.kill)
        server = ServerProcess(process)
        serving = server.until("serving")
        channel = stack.enter_context(grpc.insecure_channel(serving["address"]))
        models: Any = model_pb2_grpc.ModelServiceStub(channel)
        generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)

        def model() -> Any:
            return models.GetModel(model_pb2.GetModelRequest(model="net")).model

        before = model()
        assert (before.state, before.ready) == (model_pb2.MODEL_STATE_AVAILABLE, False)
        total = size_of_weights(tiny_folder, VAE, TEXT, UNET)
        assert before.weight_bytes == total
        assert before.limits.max_size
        assert hub.downloads() == [], "it is described from its configuration"
        loading = models.LoadModel.future(model_pb2.LoadModelRequest(model="net"))
        while (now := model()).load.fetched_bytes < size_of_weights(tiny_folder, VAE, TEXT):
            assert not loading.done()
        assert now.state == model_pb2.MODEL_STATE_LOADING
        assert now.load.fetched_bytes < now.load.fetch_bytes == total
        logged = server.until("model is being fetched")
        assert (logged["model"], logged["of"]) == ("net", total)
        hub.released.set()
        assert loading.result(timeout=120).model.state == model_pb2.MODEL_STATE_RESIDENT
        request = generation_pb2.GenerateRequest(prompt="a star", steps=2, width=64, height=64)
        assert len(generation.Generate(request, timeout=120).images) == 1
        metrics = urllib.request.urlopen(f"http://{serving['metrics']}/metrics").read().decode()
        assert 'darkroom_model_loads_total{from="hub",model="net",outcome="loaded"} 1.0' in metrics
    assert hub.downloads() == sorted([UNET, VAE, TEXT])


HALF = ["--model", f"half={MODEL}@fp16", "--dtype", "float32"]


def serve(
    hub: Hub, cache: Path, token: str, models: Sequence[str] = HALF
) -> "subprocess.Popen[str]":
    """``serve``, in a process that HF_ENDPOINT sends to ``hub``; by default the branch ``fp16``."""
    env = CLEAN | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache),
        "XDG_CACHE_HOME": str(cache),
        "HF_TOKEN": token,
    }
    flags = ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    return subprocess.Popen(
        [sys.executable, "-m", "darkroom_server", "serve", *flags, *models, "--rows", "2"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_serve(hub: Hub, tmp_path: Path) -> None:
    """HF_TOKEN and the revision reach the hub; without access, the exit code is 2.

    Both processes run at the same time, because most of their time is imports.
    """
    with ExitStack() as stack:
        served, failed = (
            stack.enter_context(serve(hub, tmp_path / token, token)) for token in (MEMBER, STRANGER)
        )
        stack.callback(served.kill)
        stack.callback(failed.kill)
        loaded = ServerProcess(served).until("model loaded")
        _, errors = failed.communicate(timeout=120)
    assert loaded["revision"] == hub.repositories[MODEL].commit("fp16")
    assert tokens(hub, MODEL) == {MEMBER, STRANGER}
    assert hub.downloads() == sorted([UNET, VAE, TEXT])
    assert failed.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith(f"darkroom-server: error: model '{MODEL}' is not cached"), errors
    assert GATED in last
