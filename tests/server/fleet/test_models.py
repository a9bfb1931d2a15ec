"""Servers whose catalogues are the same, and that have different models in memory."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from darkroom.v1 import model_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.settings import Dispatch, Models, Storage
from tests.server.fleet.conftest import POLL_SECONDS, Servers
from tests.server.streams import submit
from tests.server.telemetry.scrape import values
from tests.server.wire import Wire

pytestmark = pytest.mark.needs("postgresql")

MODELS = ("owls", "toads")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A folder of two models, of which an engine holds one, and one job."""
    for model in MODELS:
        (tmp_path / model).mkdir()
        (tmp_path / model / "model_index.json").write_text("{}")
    return {
        "fake": {"catalogue": [fake_model(model) for model in MODELS]},
        "models": Models(models_dir=str(tmp_path), device_memory_budget=100),
        "dispatch": Dispatch(max_resident_samples=1),
    }


async def load(wire: Wire, model: str) -> None:
    await wire.models.LoadModel(model_pb2.LoadModelRequest(model=model))


async def claims(wire: Wire) -> float:
    """How often it has claimed."""
    return (await values(wire, "darkroom_ledger_seconds_count", "op")).get(("claim",), 0.0)


@pytest.mark.parametrize("delay", [1000.0, 0.0])
async def test_a_job_goes_to_the_server_that_has_its_model_unless_it_waits_too_long(
    servers: Servers, options: dict[str, Any], delay: float
) -> None:
    storage = Storage(ledger=servers.url, claim_delay=delay)
    a, b = [await servers.start(name, storage=storage, **options) for name in "ab"]
    await load(a, "owls")
    await load(b, "toads")
    # Until the other one knows.
    await servers.finds(2, "SELECT 1 FROM servers WHERE held <> '{}'")
    await submit(a, model="owls", request_id="runs", steps=5)
    await servers.becomes(lambda states: states == {"runs": 1})
    before = await claims(b)
    await submit(a, model="owls", request_id="waits", steps=5)
    if not delay:
        assert (await b.submitted.get()).request_id == "waits"
        assert b.engine.loaded == ["toads", "owls"]
        return
    while await claims(b) < before + 3:
        await asyncio.sleep(POLL_SECONDS)
    assert (await servers.states())["waits"] == 0
    await a.submitted.get()
    a.engine.advance(5)
    assert (await a.submitted.get()).request_id == "waits"
    assert b.engine.loaded == ["toads"]
    assert b.submitted.empty()
