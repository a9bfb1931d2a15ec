"""Answers report the server's backlog in the trailer that balancers read (ORCA)."""

import time
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from darkroom.v1 import generation_pb2, load_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.dispatch import Backlog, PeerAddresses
from darkroom_server.rpc.interceptors.base import Method
from darkroom_server.rpc.interceptors.call_context import CallContexts
from darkroom_server.settings import Shutdown
from tests.server.dispatch.harness import SPEED
from tests.server.telemetry.scrape import values
from tests.server.wire import Wire, serving

LOAD_KEY = "endpoint-load-metrics-bin"
BACKLOG = "darkroom_backlog_seconds"
TIMED: dict[str, Any] = {"models": [replace(fake_model(), speed=SPEED)]}


def orca_load_report() -> Any:
    """The class of xds.data.orca.v3.OrcaLoadReport, as far as balancers read it.

    In a pool of its own. The numbers are those of the published proto.
    """
    double, string, message = 1, 9, 11
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3"
    )
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in {
        "cpu_utilization": 1,
        "mem_utilization": 2,
        "rps_fractional": 6,
        "eps": 7,
        "application_utilization": 9,
    }.items():
        report.field.add(name=name, number=number, type=double, label=1)
    for name, entry, number in (
        ("request_cost", "RequestCostEntry", 4),
        ("utilization", "UtilizationEntry", 5),
        ("named_metrics", "NamedMetricsEntry", 8),
    ):
        nested = report.nested_type.add(name=entry)
        nested.options.map_entry = True
        nested.field.add(name="key", number=1, type=string, label=1)
        nested.field.add(name="value", number=2, type=double, label=1)
        type_name = f".xds.data.orca.v3.OrcaLoadReport.{entry}"
        report.field.add(name=name, number=number, type=message, label=3, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")
    )


async def reported(call: Any) -> float:
    """The backlog in the trailers of ``call``, once it has ended."""
    trailers = dict(list(await call.trailing_metadata()))
    assert trailers["darkroom-request-id"]
    return float(trailers["darkroom-backlog-seconds"])


def submit(wire: Wire, **fields: Any) -> Any:
    generation = generation_pb2.GenerateRequest(prompt="a star", **fields)
    request = generation_pb2.SubmitGenerationRequest(generation=generation)
    return wire.generation.SubmitGeneration(request)


async def test_the_answer_to_a_submit_reports_the_job_itself_and_those_before_it() -> None:
    async with serving(fake=TIMED, shutdown=Shutdown(grace=0.0)) as wire:
        first = await reported(submit(wire, steps=4))
        second = await reported(submit(wire, steps=40))
        metric = await values(wire, BACKLOG, "model")
    assert 4.0 < first <= 4.5
    assert second > first + 30.0
    assert 30.0 < metric["demo",] <= second


async def test_every_kind_of_answer_reports() -> None:
    async with serving(fake={**TIMED, "auto": True}) as wire:
        generate = wire.generation.Generate(generation_pb2.GenerateRequest(prompt="a star"))
        assert await reported(generate) == 0.0
        stream = wire.stream("a star")
        async for _ in stream:
            pass
        assert await reported(stream) == 0.0
    async with serving(fake=TIMED, shutdown=Shutdown(grace=0.0)) as wire:
        await submit(wire, steps=40)
        rejected = wire.generation.Generate(generation_pb2.GenerateRequest(prompt="", width=1))
        assert await rejected.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await reported(rejected) > 30.0


class Recorded:
    """A gRPC context that only records trailers."""

    trailers: tuple[tuple[str, Any], ...] = ()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def set_trailing_metadata(self, trailers: Any) -> None:
        self.trailers = trailers


@pytest.mark.parametrize(
    ("service", "reports"),
    [("darkroom.v1.GenerationService", True), ("darkroom.v1.ModelService", False)],
)
async def test_balancers_read_it_as_their_own_message(service: str, reports: bool) -> None:
    backlog = Backlog()
    backlog.finish_at = {"one": time.monotonic() + 5.0, "other": time.monotonic() + 60.0}
    contexts, context = CallContexts(PeerAddresses(), backlog=backlog), Recorded()
    async with contexts.around(Method(service, "Any", "unary"), cast("Any", context), None):
        pass
    trailers = dict(context.trailers)
    assert (LOAD_KEY in trailers) is reports
    if reports:
        report = orca_load_report().FromString(trailers[LOAD_KEY])
        assert report.named_metrics[BACKLOG] == pytest.approx(60.0, abs=5.0)
        assert report.cpu_utilization == report.application_utilization == 0.0
    # Numbers that differ would not be found.
    wrong = orca_load_report()(request_cost={BACKLOG: 1.0}).SerializeToString()
    assert BACKLOG not in load_pb2.LoadReport.FromString(wrong).named_metrics
