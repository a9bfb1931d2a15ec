"""What the trace's other servers are made of, without Ray and Triton, which CI has not."""

import asyncio
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.inprocess import pipelines
from bench.peers.protocols import Ended
from bench.report.results import ROOT
from bench.trace.costs import BYTES
from bench.trace.figures import read_swaps
from bench.trace.peers.clients import RayClient, TritonClient
from bench.trace.peers.config import ImageRequest, PeerConfig, from_wire, image_requests
from bench.trace.peers.loads import CostedLoads
from bench.trace.peers.model import PeerModel
from bench.trace.peers.on_demand import OnDemand
from bench.trace.peers.serve import config_of
from bench.trace.peers.triton_device import Device, DeviceClient
from bench.trace.peers.triton_repository import write_repository
from bench.trace.requests import Kind, TraceRequest
from bench.trace.served import picture
from bench.trace.virtual import run_virtually
from darkroom_server.settings.sources import DEMO_MODEL
from tests.bench.test_peers import RUNTIME

THREE = TraceRequest(7, "", 30, 7.5, seed=5, images=3, model="m1", kind=Kind.INPAINT, loras=1)


def config(tmp_path: Path, **fields: Any) -> PeerConfig:
    made = config_of(
        DEMO_MODEL.parent, "run", RUNTIME, device_models=2, host_models=3, load_scale=1.0
    )
    named = {"swaps": str(tmp_path / "swaps.json"), "trace": str(tmp_path / "trace.jsonl")}
    return replace(made, **{**named, **fields})


class Slow:
    """A server whose loads take three seconds; it notes its orders."""

    def __init__(self, most: int) -> None:
        self.orders: list[str] = []
        self.models = OnDemand(most, self._load, self._unload)
        self.broken = ""

    def use(self, model: str) -> AbstractAsyncContextManager[None]:
        return self.models.use(model)

    async def ask(self, model: str, seconds: float = 0.0) -> None:
        async with self.use(model):
            self.orders.append(model)
            await asyncio.sleep(seconds)

    async def _load(self, model: str) -> None:
        await asyncio.sleep(3.0)
        if model == self.broken:
            raise ValueError(model)
        self.orders.append(f"+{model}")

    async def _unload(self, model: str) -> None:
        self.orders.append(f"-{model}")


def test_what_was_used_longest_ago_makes_room() -> None:
    async def ask() -> None:
        for model in "abac":
            await slow.ask(model)

    slow = Slow(2)
    run_virtually(ask)
    assert slow.orders == ["+a", "a", "+b", "b", "a", "-b", "+c", "c"]
    assert slow.models.longest_wait == pytest.approx(3.0)


def test_a_model_without_requests_makes_room_before_one_with_some() -> None:
    async def ask() -> None:
        async with slow.use("a"):
            await slow.ask("b")
            await slow.ask("c")

    slow = Slow(2)
    run_virtually(ask)
    assert slow.orders == ["+a", "+b", "b", "-b", "+c", "c"]


def test_requests_end_before_their_model_makes_room_and_new_ones_wait() -> None:
    async def ask() -> None:
        first = asyncio.create_task(slow.ask("a", seconds=10.0))
        await asyncio.sleep(4.0)
        other = asyncio.create_task(slow.ask("b"))
        await asyncio.sleep(1.0)
        await asyncio.gather(first, other, slow.ask("a"))

    slow = Slow(1)
    run_virtually(ask)
    assert slow.orders == ["+a", "a", "-a", "+b", "b", "-b", "+a", "a"]
    # Eight for the first request, three for each load.
    assert slow.models.longest_wait == pytest.approx(8.0 + 2 * 3.0)


def test_one_load_is_for_all_that_wait() -> None:
    async def ask() -> None:
        await asyncio.gather(*map(slow.ask, "abbab"))

    slow = Slow(2)
    run_virtually(ask)
    assert slow.orders == ["+a", "a", "a", "+b", "b", "b", "b"]


def test_a_load_that_fails_ends_the_requests_for_it_only() -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(*map(slow.ask, "aab"), return_exceptions=True)

    slow = Slow(1)
    slow.broken = "a"
    first, second, third = run_virtually(ask)
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert third is None
    assert slow.orders == ["+b", "b"]


def test_a_load_waits_for_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    read: list[str] = []

    def read_model(name: str) -> int:
        read.append(name)
        return len(read)

    made = config(tmp_path, host_models=2)
    loads = CostedLoads(made, read_model)
    assert read_swaps(Path(made.swaps)).loads == 0
    assert [loads.load(model) for model in "aabacb"] == [1, 1, 2, 1, 3, 4]
    assert read == ["a", "b", "c", "b"], "the host has room for two"
    loads.waited(7.0)
    loads.waited(2.0)
    disk, host = BYTES / 2e9 + BYTES / 20e9, BYTES / 20e9
    assert slept == pytest.approx([disk, host, disk, host, disk, disk])
    swaps = read_swaps(Path(made.swaps))
    assert (swaps.loads, swaps.from_disk, swaps.longest_wait) == (6, 4, 7.0)
    assert swaps.bytes_moved == 10 * BYTES


def test_the_environments_of_the_peers_have_what_their_servers_import() -> None:
    """They have neither structlog nor gRPC's health checks, which our own server needs."""

    def imports(*modules: str) -> bool:
        block = "import sys; sys.modules.update(dict.fromkeys(('structlog', 'grpc_health')));"
        names = ", ".join(f"bench.trace.{module}" for module in modules)
        code = f"{block} import {names}"
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        return ended.returncode == 0

    modules = ("config", "loads", "triton_device", "triton_repository")
    assert imports(*(f"peers.{module}" for module in modules))
    assert not imports("policies"), "negative control: the policies are those of our own server"


def of_three() -> list[ImageRequest]:
    return image_requests(THREE, prompt="a star", side=64, loras=("x", "y"), picture=b"png")


def test_a_request_of_the_trace_is_one_for_each_image() -> None:
    found = of_three()
    assert [each.seed for each in found] == [5, 6, 7]
    assert {(each.images, each.model, each.width) for each in found} == {(1, "m1", 64)}
    assert {(each.loras, each.image) for each in found} == {(("x",), b"png")}
    plain = image_requests(
        replace(THREE, kind=Kind.TEXT), prompt="", side=64, loras=(), picture=b"p"
    )
    assert plain[0].image == b""


def test_its_wire_form_is_lossless_but_for_the_model() -> None:
    for request in of_three():
        assert from_wire(json.loads(json.dumps(request.to_wire()))) == replace(request, model="")


def test_another_kind_or_adapter_is_another_call() -> None:
    request = of_three()[0]
    assert replace(request, seed=9).settings == request.settings
    assert replace(request, kind=Kind.IMAGE).settings != request.settings
    assert replace(request, loras=()).settings != request.settings


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_model_makes_the_images_of_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the threads of one operation wait for each other longer than they compute.
    monkeypatch.setattr(pipelines, "allowed_threads", lambda: 1)
    made = config(tmp_path)
    model = PeerModel(DEMO_MODEL.name, made)
    plain = replace(of_three()[0], kind=Kind.TEXT, loras=(), steps=2, image=b"")
    other = replace(plain, seed=6)
    first, second = model.generate([plain, other])
    expected = pipelines.Pipelines(str(DEMO_MODEL), RUNTIME, 8).images([plain, other])
    assert [first, second] == expected
    assert first != second
    ids = tuple(made.loras)
    begun = replace(plain, kind=Kind.IMAGE, image=picture(64))
    variants = [
        replace(plain, loras=ids[:1]),
        replace(plain, loras=ids),
        begun,
        replace(begun, kind=Kind.INPAINT),
    ]
    found = model.generate(variants)
    assert len({first, *found}) == 5, "kinds and adapters change the image"
    assert model.generate([plain, other]) == [first, second], "adapters are off again"
    calls = [json.loads(line)[2] for line in Path(made.trace).read_text().splitlines()]
    assert [len(indexes) for indexes in calls] == [2, 1, 1, 1, 1, 2]


def test_the_repository_has_a_folder_for_each_model(tmp_path: Path) -> None:
    write_repository(tmp_path, ["a", "b"], max_images=8, batch_timeout=0.01, device="/run/socket")
    config = (tmp_path / "b" / "config.pbtxt").read_text()
    assert 'name: "b"' in config
    assert "max_batch_size: 8" in config
    assert "dynamic_batching { max_queue_delay_microseconds: 10000 }" in config
    assert 'parameters { key: "device" value { string_value: "/run/socket" } }' in config
    assert "TritonPythonModel" in (tmp_path / "a" / "1" / "model.py").read_text()


class Reversing:
    """Models that write their rows backwards."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, name: str) -> None:
        if name == "broken":
            raise ValueError("no such file")
        self.loaded.append(name)

    def unload(self, name: str) -> None:
        self.loaded.remove(name)

    def generate(self, name: str, rows: Sequence[str]) -> list[bytes]:
        return [f"{name}:{row[::-1]}".encode() for row in rows]


@pytest.fixture
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reversing, str]]:
    # The path of a socket must be short.
    path = str(tmp_path_factory.mktemp("device") / "socket")
    models = Reversing()
    with Device(models, path):
        yield models, path


def test_the_device_answers_or_raises(device: tuple[Reversing, str]) -> None:
    models, path = device
    client = DeviceClient(path)
    client("load", "a")
    assert models.loaded == ["a"]
    assert client("generate", "a", ["ab", "c"]) == [b"a:ba", b"a:c"]
    with pytest.raises(ValueError, match="no such file"):
        client("load", "broken")
    client("unload", "a")
    assert models.loaded == []
    client.close()


def test_a_model_of_triton_splits_the_batch_by_request(
    device: tuple[Reversing, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, path = device
    backend = SimpleNamespace(
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: request),
        Tensor=lambda _, array: array,
        InferenceResponse=lambda tensors: tensors[0].tolist(),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    model = importlib.import_module("bench.trace.peers.triton_model").TritonPythonModel()
    parameters = {"device": {"string_value": path}}
    model.initialize({"model_name": "a", "model_config": json.dumps({"parameters": parameters})})
    assert models.loaded == ["a"]
    requests = [np.array([[b"ab"], [b"cd"]], dtype=object), np.array([[b"ef"]], dtype=object)]
    assert model.execute(requests) == [[[b"a:ba"], [b"a:dc"]], [[b"a:fe"]]]
    model.finalize()
    assert models.loaded == []


class Server(ThreadingHTTPServer):
    """Answers with the seeds of the rows; it notes each path, and Ray's model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.orders: list[str] = []
        self.failing = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self.headers.get("serve_multiplexed_model_id", "")
        self.server.orders.append(f"{self.path}{model}")
        content, head = b"", 0
        if "inputs" in body:
            files = [str(json.loads(row)["seed"]).encode() for row in body["inputs"][0]["data"]]
            content = b"".join(len(file).to_bytes(4, "little") + file for file in files)
        elif "seed" in body:
            content = str(body["seed"]).encode()
        failing = self.server.failing and self.server.failing in self.path
        self.send_response(400 if failing else 200)
        self.send_header("Inference-Header-Content-Length", str(head))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_ray_gets_the_model_in_a_header() -> None:
    async def send(port: int) -> list[bytes]:
        client = RayClient(port)
        try:
            return await client.images(of_three())
        finally:
            await client.close()

    with serving() as server:
        assert asyncio.run(send(server.server_port)) == [b"5", b"6", b"7"]
        assert server.orders == ["/m1"] * 3


def test_triton_gets_orders_to_load_and_to_unload() -> None:
    async def send(port: int) -> list[list[bytes]]:
        client = TritonClient(port, 1)
        try:
            both = [[replace(each, model=model) for each in of_three()] for model in ("a", "b")]
            return [await client.images(requests) for requests in (*both, both[1])]
        finally:
            await client.close()

    with serving() as server:
        assert asyncio.run(send(server.server_port)) == [[b"5", b"6", b"7"]] * 3
        assert [path.removeprefix("/v2/") for path in server.orders] == [
            "repository/models/a/load",
            "models/a/infer",
            "repository/models/a/unload",
            "repository/models/b/load",
            "models/b/infer",
            "models/b/infer",
        ]


def test_a_load_that_triton_refuses_ends_the_request() -> None:
    async def send(port: int) -> None:
        client = TritonClient(port, 1)
        try:
            await client.images(of_three())
        finally:
            await client.close()

    with serving() as server:
        server.failing = "load"
        with pytest.raises(Ended):
            asyncio.run(send(server.server_port))
        assert server.orders == ["/v2/repository/models/m1/load"]
