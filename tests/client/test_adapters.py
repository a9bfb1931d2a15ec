"""Adapters: what a client lists, and what the command line prints."""

import json

import pytest

from darkroom_client import Adapter, AdapterKind, AsyncClient, Client, ModelNotFound
from darkroom_client.cli import main
from darkroom_client.testing import FakeServer

PASTEL = Adapter(
    id="pastel", models=("demo", "other"), rank=8, bytes=3 * 2**20, resident=True, rejection=""
)
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
