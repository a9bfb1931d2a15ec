import asyncio
import signal
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server import app
from darkroom_server.settings import Dispatch, Shutdown
from tests.server.app.process import start
from tests.server.wire import NOT_SERVING, SERVING, refusal, serving

REQUEST = generation_pb2.GenerateRequest(prompt="a star")
ONE_AT_A_TIME = Dispatch(max_resident_samples=1)


async def test_accepted_jobs_finish_and_new_jobs_are_rejected() -> None:
    async with serving(dispatch=ONE_AT_A_TIME) as wire:
        running = wire.generating(request_id="a")
        await wire.submitted.get()
        queued = wire.generating(request_id="b")
        while not wire.server.dispatcher.queued_jobs:
            await asyncio.sleep(0)
        wire.server.stop()
        await wire.serve
        shutdown = asyncio.create_task(wire.server.shutdown())
        await wire.health_becomes(NOT_SERVING)
        assert await wire.health("liveness") == SERVING
        error = await refusal(wire.generate())
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.info.reason == "DRAINING"
        assert error.trailers["grpc-retry-pushback-ms"] == "1000"
        assert error.detail(error_details_pb2.RetryInfo).retry_delay.seconds == 1
        wire.engine.finish("a")
        await running
        assert not shutdown.done()
        wire.engine.finish("b")
        await queued
        await shutdown
        assert wire.engine.closed.is_set()


async def port_closes(address: str) -> None:
    host, _, port = address.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        except ConnectionError:
            continue  # The port closed while this connection was accepted.
        writer.close()


async def test_the_port_closes_before_the_last_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "REJECT_SECONDS", 0.0)
    async with serving() as wire:
        running = wire.generating(request_id="a")
        await wire.submitted.get()
        wire.server.stop()
        await wire.serve
        shutdown = asyncio.create_task(wire.server.shutdown())
        await port_closes(wire.server.address)
        assert not shutdown.done()
        wire.engine.finish("a")
        assert (await running).images
        await shutdown


async def test_jobs_that_outlast_the_grace_fail_with_unavailable() -> None:
    async with serving(dispatch=ONE_AT_A_TIME, shutdown=Shutdown(grace=0.01)) as wire:
        calls = [wire.generating() for _ in range(2)]
        await wire.submitted.get()
        while not wire.server.dispatcher.queued_jobs:
            await asyncio.sleep(0)
        wire.server.stop()
        await wire.serve
        await wire.server.shutdown()
        for call in calls:
            error = await refusal(call)
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert error.info.reason == "DRAINING"


async def test_calls_are_accepted_during_the_drain_delay() -> None:
    async with serving(fake={"auto": True}, shutdown=Shutdown(drain_delay=60)) as wire:
        wire.server.stop()
        await wire.serve
        shutdown = asyncio.create_task(wire.server.shutdown())
        await wire.health_becomes(NOT_SERVING)
        assert (await wire.generate()).images
        shutdown.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shutdown
        await wire.server.dispatcher.drain(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_a_second_one_forces(number: signal.Signals) -> None:
    with start() as server:
        address = server.until("serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate.future(REQUEST)  # The fake engine never steps by itself.
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
            assert next(watch).status == SERVING
            server.until("submitted")
            server.send(number)
            assert next(watch).status == NOT_SERVING
            server.until("draining")
            with pytest.raises(grpc.RpcError, match="shutting down"):
                stub.Generate(REQUEST)
            assert not call.done()
            server.send(number)
            assert server.wait() == -number
            watch.cancel()


def test_a_signal_lets_running_jobs_finish() -> None:
    with start() as server:
        address = server.until("serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate.future(REQUEST)
            server.until("submitted")
            server.send(signal.SIGTERM)
            assert server.until("draining")["jobs"] == 1
            server.send(signal.SIGUSR1)
            assert call.result().images
        assert server.wait() == 0
        assert '"stopped"' in server.rest()[-1]


STREAM = generation_pb2.GenerateStreamRequest(generation=REQUEST)
SUBMIT = generation_pb2.SubmitGenerationRequest(
    generation=generation_pb2.GenerateRequest(prompt="a star", request_id="left")
)


def test_streams_and_submitted_jobs_finish_too() -> None:
    with start() as server:
        address = server.until("serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            stub.SubmitGeneration(SUBMIT)
            stream = stub.GenerateStream(STREAM)
            watch = stub.WatchGeneration(generation_pb2.WatchGenerationRequest(request_id="left"))
            calls: tuple[Any, ...] = (stream, watch)
            for call in calls:
                assert next(call).event.WhichOneof("event") == "accepted"
            server.send(signal.SIGTERM)
            assert server.until("draining")["jobs"] == 2
            server.send(signal.SIGUSR1)
            for call in calls:
                assert [*call][-1].event.WhichOneof("event") == "finished"
        assert server.wait() == 0


def test_streams_that_outlast_the_grace_get_the_reason() -> None:
    with start("--grace", "0.1") as server:
        address = server.until("serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            stub.SubmitGeneration(SUBMIT)
            stream = stub.GenerateStream(STREAM)  # The fake engine never steps by itself.
            watch = stub.WatchGeneration(generation_pb2.WatchGenerationRequest(request_id="left"))
            calls: tuple[Any, ...] = (stream, watch)
            for call in calls:
                assert next(call).event.WhichOneof("event") == "accepted"
            server.send(signal.SIGTERM)
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                # The stubs do not say that the error is also the call.
                status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
                assert status is not None
                info = error_details_pb2.ErrorInfo()
                assert any(detail.Unpack(info) for detail in status.details)
                assert (status.code, info.reason) == (code_pb2.UNAVAILABLE, "DRAINING")
        assert server.until("drain ends jobs unfinished")["jobs"] == 2
        assert server.wait() == 0


def test_a_signal_during_loading_stops_the_server() -> None:
    with start(load=False) as server:
        server.until("loading")
        server.send(signal.SIGTERM)
        assert server.wait() == 0


def test_a_lost_engine_ends_the_process() -> None:
    with start("--engine-max-restarts", "0", dies_after=1, auto=True) as server:
        address = server.until("serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="the engine stopped"):
                stub.Generate(REQUEST)
        assert server.wait() == 1
        assert server.rest()[-1].startswith("darkroom-server: error: ")
