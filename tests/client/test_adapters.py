"""Adapters: what a client lists, and what the command line prints."""

import json
import threading

import pytest

from darkroom_client import (
    Adapter,
    AdapterKind,
    AdapterNotFound,
    AdapterUnusable,
    AsyncClient,
    Client,
    ModelNotFound,
    PermissionDenied,
)
from darkroom_client.cli import main
from darkroom_client.testing import Behaviour, FakeServer, fake_model

PASTEL = Adapter(
    id="pastel", models=("demo", "other"), rank=8, bytes=3 * 2**20, resident=True, rejection=""
)
NEON = Adapter(id="neon", models=("demo",), rank=4)
EDGES = Adapter(
    id="edges", kind=AdapterKind.CONTROLNET, models=("demo",), bytes=9_000_000, resident=True
)
OUTLINE = Adapter(id="outline", models=("other",), rank=256, rejection="its rank is 256")


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer(models=["demo", "other"], adapters=[PASTEL, OUTLINE, EDGES])


def test_adapters_come_by_id_with_every_field(fake: FakeServer) -> None:
    with fake, Client(fake.target) as client:
        assert client.adapters() == [EDGES, OUTLINE, PASTEL]
        assert PASTEL.kind is AdapterKind.LORA


def test_a_model_selects_the_adapters_that_fit_it(fake: FakeServer) -> None:
    with fake, Client(fake.target) as client:
        assert client.adapters("demo") == [EDGES, PASTEL]
        assert client.adapters("other") == [OUTLINE, PASTEL]
        with pytest.raises(ModelNotFound):
            client.adapters("none")


async def test_the_async_client_lists_the_same(fake: FakeServer) -> None:
    with fake:
        async with AsyncClient(fake.target) as client:
            assert await client.adapters("other") == [OUTLINE, PASTEL]


def test_the_command_line_prints_them(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    with fake:
        assert main(["adapters", "--target", fake.target]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert ["pastel", "lora", "8", "3.0", "yes", "demo other", "-"] in lines
        assert ["outline", "lora", "256", "0.0", "no", "other", "its rank is 256"] in lines
        assert main(["adapters", "--target", fake.target, "--model", "demo", "--json"]) == 0
        edges, found = json.loads(capsys.readouterr().out)
        assert (edges["id"], edges["kind"]) == ("edges", "controlnet")
        assert (found["id"], found["resident"]) == ("pastel", True)


@pytest.fixture
def changing() -> FakeServer:
    return FakeServer(
        models=[fake_model("demo", optional_fields=("loras",)), "other"],
        adapters=[PASTEL],
        addable_adapters=[NEON, OUTLINE],
    )


def test_an_adapter_is_added_and_removed(changing: FakeServer) -> None:
    with changing, Client(changing.target) as client:
        assert client.add_adapter("neon") == NEON
        assert client.add_adapter("neon") == NEON
        assert client.adapters() == [NEON, PASTEL]
        assert client.remove_adapter("pastel") == 0
        assert client.adapters() == [NEON]
        assert client.add_adapter("pastel") == PASTEL
        for unknown in (client.add_adapter, client.remove_adapter):
            with pytest.raises(AdapterNotFound, match="no adapter 'none'"):
                unknown("none")
        with pytest.raises(AdapterUnusable, match="its rank is 256"):
            client.add_adapter("outline")


def test_a_removed_adapter_stays_with_its_jobs(changing: FakeServer) -> None:
    goes_on = threading.Event()
    changing.script(Behaviour(hold=goes_on))
    with changing, Client(changing.target) as client:
        job = client.submit("a star", loras={"pastel": 1.0}, model="demo")
        assert client.remove_adapter("pastel") == 1
        with pytest.raises(AdapterUnusable, match="unfinished jobs still use"):
            client.add_adapter("pastel")
        goes_on.set()
        assert client.result(job.request_id).images
        assert client.add_adapter("pastel") == PASTEL


async def test_the_async_client_adds_and_removes(changing: FakeServer) -> None:
    with changing:
        async with AsyncClient(changing.target) as client:
            assert await client.add_adapter("neon") == NEON
            assert await client.remove_adapter("neon") == 0
            assert await client.adapters() == [PASTEL]


def test_only_admins_change_adapters() -> None:
    with FakeServer(adapters=[PASTEL], admin=False) as server, Client(server.target) as client:
        for change in (client.add_adapter, client.remove_adapter):
            with pytest.raises(PermissionDenied, match="admin"):
                change("pastel")
        assert client.adapters() == [PASTEL]


def test_the_command_line_adds_and_removes(
    changing: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with changing:
        target = ["--target", changing.target]
        assert main(["adapters", "add", "neon", *target]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert ["neon", "lora", "4", "0.0", "no", "demo", "-"] in lines
        assert main(["adapters", "remove", "neon", "pastel", *target, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [
            {"id": "neon", "unfinished_jobs": 0},
            {"id": "pastel", "unfinished_jobs": 0},
        ]
        assert main(["adapters", "remove", "neon", *target]) == 2
        assert main(["adapters", "add", "outline", *target]) == 2
        for wrong in (["add"], ["list", "neon"], ["remove"]):
            with pytest.raises(SystemExit) as ended:
                main(["adapters", *wrong, *target])
            assert ended.value.code == 2
