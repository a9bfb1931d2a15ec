"""Models that are loaded, unloaded and pinned over the wire, with the fake engine."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom.v1 import model_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.settings import Models, Security, Shutdown, Storage
from tests.server.clock import Clock
from tests.server.ledger.copies import left_behind
from tests.server.rpc.test_jobs import name, state_of
from tests.server.security.test_tokens import bearing, entry
from tests.server.streams import submit
from tests.server.telemetry.scrape import counted, values
from tests.server.wire import SERVING, Wire, refusal, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two models, as far as the serving process looks."""
    for model in ("owls", "toads"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "model_index.json").write_text("{}")
    return tmp_path


def served(folder: Path, *, hold_loads: bool = False, host: int | None = None, **more: Any) -> Any:
    """A server over ``folder`` whose budget holds one model; jobs run to their end at once."""
    models = [fake_model("owls"), fake_model("toads")]
    return serving(
        fake={"catalogue": models, "auto": True, "hold_loads": hold_loads},
        models=Models(models_dir=str(folder), device_memory_budget=100, host_memory_budget=host),
        **more,
    )


async def load(wire: Wire, id: str, **call: Any) -> Any:
    answer = await wire.models.LoadModel(model_pb2.LoadModelRequest(model=id), **call)
    return answer.model


async def unload(wire: Wire, id: str) -> int:
    answer = await wire.models.UnloadModel(model_pb2.UnloadModelRequest(model=id))
    return int(answer.unfinished_jobs)


async def listed(wire: Wire) -> dict[str, Any]:
    found = await wire.models.ListModels(model_pb2.ListModelsRequest())
    return {model.id: model for model in found.models}


async def test_a_server_without_a_model_in_memory_is_healthy_and_serves(folder: Path) -> None:
    async with served(folder) as wire:
        assert await wire.health() == SERVING
        before = (await listed(wire))["toads"]
        assert (before.state, before.ready) == (model_pb2.MODEL_STATE_AVAILABLE, False)
        assert (before.kind, before.weight_bytes) == ("StableDiffusionPipeline", 100)
        assert not before.HasField("runtime")
        assert not before.HasField("last_used")
        assert before.limits.max_size
        assert not before.limits.max_rows
        wrong = await refusal(wire.generate(model="toads", width=65))
        assert wrong.code is grpc.StatusCode.INVALID_ARGUMENT
        assert wire.engine.loaded == []
        for model in ("toads", "owls"):
            assert len((await wire.generate(model=model)).images) == 1
        models = await listed(wire)
        assert models["owls"].state == model_pb2.MODEL_STATE_RESIDENT
        assert models["owls"].ready
        assert models["owls"].HasField("runtime")
        assert models["owls"].HasField("last_used")
        assert models["toads"].state == model_pb2.MODEL_STATE_AVAILABLE
        assert wire.engine.unloaded == ["toads"]


async def test_load_unload_and_pin(folder: Path) -> None:
    async with served(folder) as wire:
        loaded = await load(wire, "owls")
        assert loaded.state == model_pb2.MODEL_STATE_RESIDENT
        assert not loaded.pinned
        request = model_pb2.PinModelRequest(model="owls", pinned=True)
        assert (await wire.models.PinModel(request)).model.pinned
        no_room = await refusal(load(wire, "toads"))
        assert no_room.code is grpc.StatusCode.FAILED_PRECONDITION
        assert no_room.info.reason == "MODEL_MEMORY"
        same = await refusal(wire.generate(model="toads"))
        assert (same.code, same.info.reason) == (no_room.code, "MODEL_MEMORY")
        assert await unload(wire, "owls") == 0
        assert (await listed(wire))["owls"].state == model_pb2.MODEL_STATE_AVAILABLE
        assert (await load(wire, "toads")).ready
        for call in (load(wire, "../secret"), unload(wire, "hub/id")):
            unknown = await refusal(call)
            assert unknown.code is grpc.StatusCode.NOT_FOUND
            named = unknown.detail(error_details_pb2.ResourceInfo)
            assert named.resource_type == "darkroom.v1.Model"


async def test_a_load_is_shown_and_goes_on_without_its_call(folder: Path) -> None:
    async with served(folder, hold_loads=True) as wire:
        gone = asyncio.create_task(load(wire, "owls"))
        await wire.becomes(lambda: wire.engine.loading == ["owls"])
        model = (await listed(wire))["owls"]
        assert model.state == model_pb2.MODEL_STATE_LOADING
        assert model.load.remaining_seconds > 0
        gone.cancel()
        waits = wire.generating(model="owls")
        await wire.becomes(lambda: wire.server.dispatcher.queued_jobs == 1)
        wire.engine.finish_load()
        assert len((await waits).images) == 1


async def test_a_model_that_fails_says_why(folder: Path) -> None:
    async with served(folder) as wire:
        wire.engine.failing["owls"] = "its unet is cut short; copy it again"
        for call in (load(wire, "owls"), wire.generate(model="owls")):
            refused = await refusal(call)
            assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
            assert refused.info.reason == "MODEL_UNUSABLE"
            assert "cut short" in refused.message
        model = (await listed(wire))["owls"]
        assert model.state == model_pb2.MODEL_STATE_FAILED
        assert "cut short" in model.state_reason
        assert await wire.health() == SERVING
        assert len((await wire.generate(model="toads")).images) == 1
        wire.engine.failing.clear()
        assert (await load(wire, "owls")).ready
        loads = await counted(wire, "darkroom_model_loads_total", "model", "from", "outcome")
        assert loads == {
            ("owls", "disk", "failed"): 1,
            ("owls", "disk", "loaded"): 1,
            ("toads", "disk", "loaded"): 1,
        }
        assert await values(wire, "darkroom_model_evictions_total", "model") == {
            ("owls",): 0,
            ("toads",): 1,
        }
        assert await counted(wire, "darkroom_model_state", "model", "state") == {
            ("owls", "resident"): 1,
            ("toads", "available"): 1,
        }
        seconds = await counted(wire, "darkroom_model_load_seconds", "model", "from")
        assert seconds == {("owls", "disk"): 0.5, ("toads", "disk"): 0.5}


async def test_seconds_of_swaps_and_bytes_of_tiers_are_counted(folder: Path, clock: Clock) -> None:
    async def tiers() -> dict[tuple[str, ...], float]:
        return await values(wire, "darkroom_model_tier_bytes", "engine", "tier")

    async def swapping() -> float:
        return (await values(wire, "darkroom_model_swap_seconds_total"))[()]

    device, host = ("0", "device"), ("0", "host")
    began = time.monotonic()
    async with served(folder, hold_loads=True, host=100) as wire:
        engine = wire.engine
        assert await tiers() == {device: 0, host: 0}
        assert await swapping() == 0
        for model, held in (("owls", 0), ("toads", 100)):
            waits = wire.generating(model=model)
            await wire.becomes(lambda: bool(engine.reading))
            clock.skip(3.0)
            engine.finish_read()
            await wire.becomes(lambda: bool(engine.loading))
            clock.skip(2.0)
            engine.finish_load()
            await waits
            assert await tiers() == {device: 100, host: held}
        # A load that fails takes time too.
        before = await swapping()
        engine.failing["owls"] = "its unet is cut short"
        waits = wire.generating(model="owls")
        await wire.becomes(lambda: bool(engine.loading))
        clock.skip(3.0)
        engine.finish_load()
        assert (await refusal(waits)).info.reason == "MODEL_UNUSABLE"
        assert await swapping() - before >= 3.0
        skipped = 2 * 5.0 + 3.0
        assert skipped <= await swapping() <= time.monotonic() - began


async def test_jobs_of_the_ledger_load_their_models(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    first: dict[str, Any] = {
        "storage": Storage(ledger=f"sqlite:{path}"),
        "shutdown": Shutdown(grace=0.0),
    }
    async with served(folder, hold_loads=True, **first) as wire:
        await submit(wire, request_id="mine", model="toads")
        await wire.becomes(lambda: wire.engine.loading == ["toads"])
        copy = left_behind(path)
    async with served(folder, storage=Storage(ledger=f"sqlite:{copy}")) as wire:
        await wire.becomes(lambda: wire.server.results.find(ANONYMOUS.name, "mine").ended)
        assert name((await state_of(wire, "mine")).state) == "FINISHED"
        assert wire.engine.loaded == ["toads"]


async def test_only_admins_change_models(folder: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("boss", "boss-token", "admin = true") + entry("user", "user-token"))
    async with served(folder, security=Security(tokens=str(tokens), insecure=True)) as wire:
        calls = {
            "LoadModel": model_pb2.LoadModelRequest(model="owls"),
            "UnloadModel": model_pb2.UnloadModelRequest(model="owls"),
            "PinModel": model_pb2.PinModelRequest(model="owls", pinned=True),
        }
        for method, request in calls.items():
            call = getattr(wire.models, method)
            refused = await refusal(call(request, metadata=bearing("user-token")))
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED
            assert refused.info.reason == "PERMISSION_DENIED"
            await call(request, metadata=bearing("boss-token"))
