"""GetStatus: the state of the server, its models and its engines."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc

from darkroom.v1 import model_pb2, server_pb2, server_pb2_grpc
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import DenoiserCompiled, MemoryReport, RowLimitCorrected
from darkroom_server.core.model_runtime import ModelSpeed, RowLimitSource
from darkroom_server.settings import Dispatch, Engine, Models, Security
from tests.server.wire import NOT_SERVING, SERVING, Wire, refusal, serving

SPEED = ModelSpeed(passes=((2, 1.0), (4, 1.5)), decode=0.5)
TIMED: dict[str, Any] = {"models": [replace(fake_model(), speed=SPEED)]}


async def status(wire: Wire, metadata: Any = ()) -> Any:
    stub: Any = server_pb2_grpc.ServerServiceStub(wire.channel)
    return await stub.GetStatus(server_pb2.GetStatusRequest(), metadata=metadata)


async def test_the_status_of_a_server_with_a_running_job() -> None:
    limits = Dispatch(max_queued_jobs=7, max_resident_samples=2)
    async with serving(fake=TIMED, dispatch=limits) as wire:
        idle = await status(wire)
        call = wire.generating(image_count=2, steps=4)
        await wire.submitted.get()
        wire.engine._emit(MemoryReport(device="cpu", by_kind={"allocated": 5}, host_rss=9))
        wire.engine.advance(1)
        busy = await status(wire)
        wire.engine.advance(3)
        await call
        done = await status(wire)
    assert idle.state == server_pb2.SERVER_STATE_READY
    assert idle.version
    assert idle.uptime.ToMilliseconds() > 0
    assert idle.host_memory_bytes > 0
    assert idle.max_queued_jobs == 7
    (model,) = idle.models
    assert (model.id, model.ready) == ("demo", True)
    times = {time.rows: time.time.ToMilliseconds() for time in model.pass_times}
    assert times == {2: 1000, 4: 1500}
    (engine,) = busy.engines
    assert (engine.device, engine.ready, engine.restarts) == ("cpu", True, 0)
    assert (engine.jobs, engine.samples, engine.rows_in_use) == (1, 2, 4)
    assert dict(engine.memory_bytes) == {"allocated": 5}
    assert engine.host_memory_bytes == 9
    assert (busy.running_jobs, busy.models[0].running_jobs, busy.queued_jobs) == (1, 1, 0)
    assert done.accepted_jobs == 1
    assert dict(done.ended_jobs) == {"finished": 1, "failed": 0, "expired": 0, "cancelled": 0}
    assert done.engines[0].rows_in_use == 0


async def test_a_corrected_row_limit_is_visible() -> None:
    """Everywhere that shows it: the status, the model, the dispatcher's view of the engine."""
    measured = replace(
        fake_model(),
        runtime=replace(fake_model().runtime, format_rule="the CPU has no such instructions"),
        limits=replace(fake_model().limits, row_limit_source=RowLimitSource.MEASURED),
        most_rows=64,
    )
    async with serving(fake={"models": [measured], "auto": True}) as wire:
        (before,) = (await status(wire)).models
        assert (before.runtime.dtype, before.runtime.preset) == ("float32", "fast")
        assert before.runtime.format_rule == "the CPU has no such instructions"
        assert before.max_rows == 8
        assert before.row_limit_source == model_pb2.ROW_LIMIT_SOURCE_MEASURED
        wire.engine._emit(RowLimitCorrected("demo", 32))
        (after,) = (await status(wire)).models
        model = (await wire.models.GetModel(model_pb2.GetModelRequest())).model
        assert after.max_rows == model.limits.max_rows == 32
        assert after.row_limit_source == model_pb2.ROW_LIMIT_SOURCE_CORRECTED
        assert model.limits.row_limit_source == model_pb2.ROW_LIMIT_SOURCE_CORRECTED
        assert model.runtime == after.runtime


async def test_the_status_of_a_server_that_loads() -> None:
    async with serving(fake={"load": False}, wait=False) as wire:
        reported = await status(wire)
        assert reported.state == server_pb2.SERVER_STATE_LOADING
        assert not reported.models[0].ready
        assert not reported.engines[0].ready
        wire.engine.become_ready()
        await wire.health_becomes(SERVING)
        assert (await status(wire)).state == server_pb2.SERVER_STATE_READY


async def test_the_status_while_an_engine_restarts_and_while_the_server_drains() -> None:
    async with serving(engine=Engine(engine_max_restarts=5)) as wire:
        wire.engine.die()
        await wire.health_becomes(NOT_SERVING)
        assert (await status(wire)).state == server_pb2.SERVER_STATE_RECOVERING
        await wire.health_becomes(SERVING)
        assert (await status(wire)).engines[0].restarts == 1
        wire.server.dispatcher.refuse_new_jobs()
        assert (await status(wire)).state == server_pb2.SERVER_STATE_DRAINING


async def test_with_tokens_the_status_is_for_admins(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n{more}\n'
            for name, more in (("web", ""), ("ops", "admin = true"))
        )
    )
    async with serving(security=Security(tokens=str(tokens))) as wire:
        error = await refusal(status(wire, (("authorization", "Bearer web"),)))
        assert error.code is grpc.StatusCode.PERMISSION_DENIED
        reported = await status(wire, (("authorization", "Bearer ops"),))
    assert reported.state == server_pb2.SERVER_STATE_READY


async def test_a_compiled_denoiser_is_visible() -> None:
    async with serving(fake={"auto": True}) as wire:
        assert (await status(wire)).models[0].runtime.denoiser == "eager"
        wire.engine._emit(DenoiserCompiled("demo"))
        (after,) = (await status(wire)).models
        model = (await wire.models.GetModel(model_pb2.GetModelRequest())).model
        assert after.runtime.denoiser == model.runtime.denoiser == "compiled"


async def test_the_status_says_where_each_model_is() -> None:
    models = [fake_model("owls"), fake_model("toads")]
    async with serving(
        fake={"catalogue": models, "auto": True},
        models=Models(
            model=("owls=x/owls", "toads=x/toads"),
            on_demand=True,
            device_memory_budget=100,
            host_memory_budget=100,
        ),
    ) as wire:
        before = {model.id: model for model in (await status(wire)).models}
        await wire.generating(model="owls")
        await wire.generating(model="toads")
        now = await status(wire)
        listed = await wire.models.ListModels(model_pb2.ListModelsRequest())
    assert {model.state for model in before.values()} == {model_pb2.MODEL_STATE_AVAILABLE}
    assert not before["owls"].HasField("last_used")
    after = {model.id: model for model in now.models}
    assert after["owls"].state == model_pb2.MODEL_STATE_HOST
    assert after["toads"].state == model_pb2.MODEL_STATE_RESIDENT
    assert (after["owls"].ready, after["owls"].HasField("runtime")) == (False, False)
    assert (after["toads"].ready, after["toads"].HasField("runtime")) == (True, True)
    for model in listed.models:
        assert model.state == after[model.id].state
        assert model.weight_bytes == after[model.id].weight_bytes == 100
        assert abs(model.last_used.seconds - after[model.id].last_used.seconds) <= 1
    (engine,) = now.engines
    assert dict(engine.weight_bytes) == {"device": 100, "host": 100}
